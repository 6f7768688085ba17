// A translator and the final norm in one: n = norm(h W^T + b).
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// RMSNorm or, with `center`, LayerNorm; the identity without `enabled`.
struct Norm {
  bool enabled;
  bool center;
  float eps;
  const float* gain;  // [D], or null
  const float* bias;  // [D], or null
};

// h [rows, D]; W [D, D] dense, or null for the identity; b [D], or null. y and n [rows, D].
void translate_norm(
    const float* h, int64_t rows, int64_t d, const Matrix* w, const float* b, const Norm& norm, Precision precision, float* y, float* n);

// dy [rows, D] from dn; computes the moments of the rows y anew.
void norm_backward(const float* y, const float* dn, int64_t rows, int64_t d, const Norm& norm, float* dy);

// The gradients at the translator, dw [d, d] and db [d], from the rows h [rows, d], y = W h + b and the gradient dn at n.
void translator_gradient(
    const float* h, const float* y, const float* dn, int64_t rows, int64_t d, const Norm& norm, Precision precision, float* dw, float* db);

}  // namespace metalens::cpu
