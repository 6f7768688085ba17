// Common parts of all kernels: constants, and functions of small numbers that Metal's library lacks.
#pragma once

#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

#define METALENS_UNROLL _Pragma("clang loop unroll(full)")
// For loops that a compiler would unroll into more instructions than a core's cache holds (12 KB on M1 and M2, by philipturner/metal-benchmarks).
#define METALENS_ROLLED _Pragma("clang loop unroll(disable)")

namespace metalens {

// Lanes of a simdgroup, and simdgroups of a threadgroup that multiplies tiles. 128 threads are well below the limit of any pipeline.
constexpr constant int LANES = 32;
constexpr constant int SIMDS = 4;
constexpr constant int THREADS = LANES * SIMDS;

// Weights are read eight values at a time. In every format, eight values fill whole bytes and share one scale.
constexpr constant int UNIT = 8;

// Ids of the vocabulary that share one entry of the map of negligible tiles.
constexpr constant int MAP_WIDTH = 32;

// The number of a thread in its threadgroup.
METAL_FUNC int thread_index(uint simd, uint lane) {
  return int(simd) * LANES + int(lane);
}

constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// exp(t) - 1 - t >= 0, with a small relative error for every t: the term of a KL divergence for one token.
METAL_FUNC float exp_beyond_linear(float t) {
  if (abs(t) >= 1.0f) {
    return precise::exp(t) - 1.0f - t;
  }
  float sum = 1.0f / 39916800.0f;  // 1 / 11!
  sum = fma(sum, t, 1.0f / 3628800.0f);
  sum = fma(sum, t, 1.0f / 362880.0f);
  sum = fma(sum, t, 1.0f / 40320.0f);
  sum = fma(sum, t, 1.0f / 5040.0f);
  sum = fma(sum, t, 1.0f / 720.0f);
  sum = fma(sum, t, 1.0f / 120.0f);
  sum = fma(sum, t, 1.0f / 24.0f);
  sum = fma(sum, t, 1.0f / 6.0f);
  sum = fma(sum, t, 0.5f);
  return sum * t * t;
}

// exp(t) - 1.
METAL_FUNC float exp_minus_one(float t) {
  return abs(t) >= 1.0f ? precise::exp(t) - 1.0f : t + exp_beyond_linear(t);
}

// log(1 + t) for t > -1. The factor t / (u - 1) undoes the rounding of u = 1 + t.
METAL_FUNC float log_one_plus(float t) {
  const float u = 1.0f + t;
  return u == 1.0f ? t : u > 3.0e38f ? precise::log(t) : precise::log(u) * (t / (u - 1.0f));
}

}  // namespace metalens
