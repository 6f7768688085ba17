// Functions of one or two arrays of the same shape, element by element, computed in float32.
#pragma once

#include "cpu/strided.h"

namespace metalens::cpu {

enum class Elementwise : int { swiglu, gelu_tanh, add, multiply };

// y = f(a, b), or f(a) for gelu_tanh, which has no b. y is [a.count(), a.width()]; it may be the memory of a or b if that has y's type and layout.
void elementwise(Elementwise function, const StridedRows& a, const StridedRows& b, const Output& y);

}  // namespace metalens::cpu
