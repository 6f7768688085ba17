// Odd polynomials of a matrix, which are the same polynomials of its singular values: p(U S V^T) = U p(S) V^T.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/buffer.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// a s + b s^3 + c s^5
struct OddPolynomial {
  float a, b, c;

  bool operator==(const OddPolynomial&) const = default;
};

// x [n, k] = the polynomials of x, one after the other, the first one first; n <= k. Half of each symmetric product is computed, so a
// polynomial of a square matrix takes the work of two products. Sums are float32, and their order does not depend on the number of threads.
void odd_polynomials(Buffer<float>& x, int64_t n, int64_t k, std::span<const OddPolynomial> polynomials, Precision precision);

}  // namespace metalens::cpu
