// Functions of one or two arrays, element by element, between a model's products.
#pragma once

#include <vector>

#include "ops/common.h"

namespace metalens {

// silu(gate) * x, computed in float32 and rounded once. Both have the same shape and float type, and so has the result. Gradient of plain MLX.
mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice s = {});

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, computed in float32 and rounded once, for floats. Gradient of plain MLX.
mx::array gelu_tanh(const mx::array& x, mx::StreamOrDevice s = {});

// Let every sum and product of two float arrays of one type, in the graph that `outputs` wait for, run on the kernels: MLX's own are slow in 16 bits
// on CPUs, and use one thread. Values are the same. Nothing else in the graph changes; nothing is evaluated.
void run_sums_natively(const std::vector<mx::array>& outputs);

}  // namespace metalens
