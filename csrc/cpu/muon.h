// The direction of a step of Muon for one matrix: momentum, scales and the orthogonal factor in few passes over memory.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/polynomials.h"
#include "cpu/precision.h"

namespace metalens::cpu {

struct MuonInput {
  const float* gradient;      // [rows, columns]
  const float* momentum;      // [rows, columns]
  const float* row_scale;     // R [rows]; null = 1
  const float* column_scale;  // S [columns]; null = 1
  int64_t rows, columns;
  float beta;   // of the momentum
  float slack;  // factor for the Frobenius norm, by which a matrix is divided before the polynomials
  std::span<const OddPolynomial> polynomials;
};

struct MuonOutput {
  float* momentum;   // V = beta momentum + (1 - beta) gradient, [rows, columns]; may be the input's
  float* direction;  // P = R polynomials(R U S^-1 / (slack norm)) S^-1, U = (1 - beta) gradient + beta V; zeros if U is 0
  float* slopes;     // <gradient, P> and <U, P>
};

// Sums over the elements do not depend on the number of threads.
void muon_direction(const MuonInput& in, Precision precision, const MuonOutput& out);

}  // namespace metalens::cpu
