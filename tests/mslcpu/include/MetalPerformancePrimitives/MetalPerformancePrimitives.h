// Stands for Apple's header of this name. What is emulated is in ../msl/tensor.h, under a name that only this header makes known.
#pragma once
#include "../msl/macros.h"
namespace mpp = msl_mpp;
