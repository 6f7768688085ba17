// The norm of every row of an array of any float type.
#pragma once

#include "cpu/strided.h"
#include "cpu/translate_norm.h"

namespace metalens::cpu {

// n [x.count(), x.width()] = norm(x). norm.enabled must be true.
void norm_rows(const StridedRows& x, const Norm& norm, const Output& n);

}  // namespace metalens::cpu
