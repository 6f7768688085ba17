// norm_grad: the gradient through the final norm, with the sums for the gradient of the translator's bias.
//
// n = norm(y): RMSNorm n = g y r with r = 1 / sqrt(mean y^2 + eps), or LayerNorm n = g (y - mean y) r + bias. With v = g dn,
//   RMSNorm    dy = r (v - y r^2 mean(y v))
//   LayerNorm  dy = r (v - mean v - x mean(x v)),  x = (y - mean y) r
// A threadgroup takes rows_per_group rows: few if there are few, so that a large GPU is filled. First each simdgroup computes r and the means of its
// rows. Then all threads walk down the columns, which writes dy once and gives db = sum dy of the block on the way. The caller adds the blocks in
// order.
#pragma once

#include "common.h"

namespace metalens {

// Most rows of a threadgroup.
constexpr constant int NORM_ROWS = 16;

enum NormKind { NO_NORM = 0, RMS_NORM = 1, LAYER_NORM = 2 };

struct NormGradProblem {
  int rows;
  int depth;
  int kind;
  int with_gain;
  int rows_per_group;  // 1 to NORM_ROWS
  float eps;
};

METAL_FUNC void norm_grad(
    const device float* y,     // [N, D]
    const device float* gain,  // [D], if there is one
    const device float* dn,    // [N, D]
    const device int* problem_words,
    device float* dy,           // [N, D]
    device float* db,           // [ceil(N / rows_per_group), D]
    threadgroup float* shared,  // 4 * NORM_ROWS
    uint3 group,
    uint simd,
    uint lane) {
  const device NormGradProblem& problem = *reinterpret_cast<const device NormGradProblem*>(problem_words);
  const int depth = problem.depth;
  const int first = int(group.x) * problem.rows_per_group;
  const int count = min(problem.rows_per_group, problem.rows - first);

  // For each row: mean y, r, mean v, and mean (x v) r. The same formula serves RMSNorm, with mean y and mean v taken as 0.
  threadgroup float* centers = shared;
  threadgroup float* scales = shared + NORM_ROWS;
  threadgroup float* means = shared + 2 * NORM_ROWS;
  threadgroup float* slopes = shared + 3 * NORM_ROWS;
  for (int i = int(simd); i < count; i += SIMDS) {
    const device float* y_row = y + long(first + i) * depth;
    const device float* dn_row = dn + long(first + i) * depth;
    float center = 0.0f, mean = 0.0f;
    if (problem.kind == LAYER_NORM) {
      for (int c = int(lane); c < depth; c += LANES) {
        center += y_row[c];
        mean += problem.with_gain != 0 ? gain[c] * dn_row[c] : dn_row[c];
      }
      center = simd_sum(center) / float(depth);
      mean = simd_sum(mean) / float(depth);
    }
    float squares = 0.0f, along = 0.0f;
    for (int c = int(lane); c < depth; c += LANES) {
      const float x = y_row[c] - center;
      squares += x * x;
      along += x * (problem.with_gain != 0 ? gain[c] * dn_row[c] : dn_row[c]);
    }
    squares = simd_sum(squares) / float(depth);
    along = simd_sum(along) / float(depth);
    if (lane == 0) {
      const float r = 1.0f / precise::sqrt(squares + problem.eps);
      centers[i] = center;
      scales[i] = r;
      means[i] = mean;
      slopes[i] = along * r * r;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int c = thread_index(simd, lane); c < depth; c += THREADS) {
    const float of_gain = problem.with_gain != 0 ? gain[c] : 1.0f;
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) {
      const long at = long(first + i) * depth + c;
      float grad = dn[at];
      if (problem.kind != NO_NORM) {
        grad = scales[i] * (of_gain * grad - means[i] - (y[at] - centers[i]) * slopes[i]);
      }
      dy[at] = grad;
      sum += grad;
    }
    db[long(group.x) * depth + c] = sum;
  }
}

}  // namespace metalens
