// lens_softmax_grad: turn a chunk of logits into q - p, with the KL divergence, the log-sum-exp and the entropy of every row.
//
// This is the delta form (see csrc/cpu/lens_kl.h). For a linear head the chunk holds the differences d = z - z*: a matrix product of n - n* gives
// them with errors relative to the difference. With a softcap the chunk holds products of n, and d is the difference of two capped logits. With the
// model's log-probability lp = z* - lse*, p = exp(lp) and any shift c,
//   S = sum exp(lp + d - c) - 1      KL = log(1 + S) + c - sum p d      q - p = (p (exp(d - c) - 1) - S p) / (1 + S)
// For c = sum p d the terms of S are p (exp(t) - 1 - t) with t = d - c. None is negative, so a small KL is as exact as a large one. If some d is far
// above the mean, exp(d - c) would overflow; such a row takes a larger c.
//
// An offset of the logits is in both z and z*, so d and the slope of a softcap do not see it: it enters lp alone.
//
// Each row has a threadgroup of 512 threads and takes three passes: the mean of d and the largest lp + d; S and the entropy; q - p. With more threads
// for a row fewer rows are in flight; by the model of estimate/kernel_model.py a large GPU's cache then still has the row in the second and third
// pass, unless the vocabulary is large. The gradient may overwrite the chunk, because each thread reads an element before it writes it. The kernel
// also writes a map with the largest |q - p| of every 32 ids, and the sum of |q - p| of every row. With them lens_backward skips tiles that would not
// change the gradient.
#pragma once

#include "head.h"
#include "row_group.h"

namespace metalens {

struct SoftmaxGradProblem {
  int rows;    // rows of the chunk
  int tokens;  // row r belongs to token r mod tokens
  int width;   // V: logits of a row, padding included
  int vocab;   // ids below it are tokens
  int is_delta;
  int with_offset;
  float softcap;     // 0: none
  float grad_scale;  // factor of the gradient: a power of two that keeps it within the range of half
};

// What the rows are compared by: the logits before the offset of one lens row and of its token's model.
struct ComparedRows {
  const device float* chunk;   // [V] differences or, with a softcap, products
  const device float* model;   // [V] products of n*
  const device float* offset;  // [V], if there is one
  float lse_model;
};

// One token of one row, lens against model.
struct Compared {
  float log_p;
  float p;
  float d;      // z - z*
  float slope;  // of the lens's softcap
};

METAL_FUNC Compared compare(const device SoftmaxGradProblem& problem, thread const ComparedRows& rows, int v) {
  Compared one;
  const float chunk = rows.chunk[v];
  const float z_model = softcapped(rows.model[v], problem.softcap);
  const float z = softcapped(chunk, problem.softcap);
  one.log_p = (problem.with_offset != 0 ? z_model + rows.offset[v] : z_model) - rows.lse_model;
  one.p = precise::exp(one.log_p);
  one.d = problem.is_delta != 0 ? chunk : z - z_model;
  one.slope = problem.is_delta != 0 ? 1.0f : softcap_slope(z, problem.softcap);
  if (one.log_p == -INFINITY && one.d != one.d) {
    one.d = 0.0f;  // both rule the token out: -inf - -inf
  }
  return one;
}

// p exp(t) - p. If p underflows but q does not, exp(t) alone would overflow.
METAL_FUNC float raised(Compared one, float t) {
  return abs(t) < 1.0f ? one.p * exp_minus_one(t) : precise::exp(one.log_p + t) - one.p;
}

template <typename G>
METAL_FUNC void lens_softmax_grad(
    const device float* chunk,      // [rows, V]
    const device float* model,      // [tokens, V] products of n*, without softcap
    const device float* lse_model,  // [tokens]
    const device float* offset,     // [V], if there is one
    const device int* problem_words,
    device G* gradient,         // [rows, V] grad_scale * (q - p) * slope; may be the chunk itself
    device float* tile_absmax,  // [rows, ceil(V / 32)] max |q - p| of 32 ids
    device float* row_l1,       // [rows] sum |q - p|
    device float* kl,           // [rows]
    device float* lse,          // [rows]
    device float* entropy,      // [rows]
    threadgroup float* slots,
    uint3 group,
    uint simd,
    uint lane) {
  const device SoftmaxGradProblem& problem = *reinterpret_cast<const device SoftmaxGradProblem*>(problem_words);
  const int row = int(group.x);
  const long first = long(row) * problem.width;
  ComparedRows rows;
  rows.chunk = chunk + first;
  rows.model = model + long(row % problem.tokens) * problem.width;
  rows.offset = offset;
  rows.lse_model = lse_model[row % problem.tokens];
  const int me = thread_index(simd, lane);

  float total = 0.0f, weighted = 0.0f, highest = -INFINITY;
  for (int v = me; v < problem.vocab; v += ROW_THREADS) {
    const Compared one = compare(problem, rows, v);
    total += one.p;
    weighted += one.p > 0.0f ? one.p * one.d : 0.0f;
    highest = max(highest, one.log_p + one.d);
    if (isnan(one.d) || isnan(one.p)) {
      weighted = NAN;
    }
  }
  total = threadgroup_sum(total, slots, simd, lane);
  const float mean = threadgroup_sum(weighted, slots, simd, lane) / total;
  highest = threadgroup_max(highest, slots, simd, lane);
  const float shift = max(mean, highest - 60.0f);

  float beyond = 0.0f, of_q = 0.0f;
  for (int v = me; v < problem.vocab; v += ROW_THREADS) {
    const Compared one = compare(problem, rows, v);
    const float t = one.d - shift;
    if (one.log_p == -INFINITY && one.d == 0.0f) {
      continue;
    }
    const float raise = raised(one, t);
    beyond += abs(t) < 1.0f ? one.p * exp_beyond_linear(t) : one.p > 0.0f ? raise - one.p * t : raise;
    const float e = raise + one.p;
    of_q += e > 0.0f ? e * (one.log_p + t) : 0.0f;
  }
  // The omitted linear terms add up to sum p (d - shift) = mean - shift, which is zero unless the shift was raised.
  const float s = threadgroup_sum(beyond, slots, simd, lane) + (mean - shift);
  const float of_row = threadgroup_sum(of_q, slots, simd, lane);
  const float log_total = log_one_plus(s);

  float sum = 0.0f;
  for (int base = int(simd) * LANES; base < problem.width; base += ROW_THREADS) {
    const int v = base + int(lane);
    float g = 0.0f;
    if (v < problem.vocab) {
      const Compared one = compare(problem, rows, v);
      const bool nowhere = one.log_p == -INFINITY && one.d == 0.0f;
      g = nowhere ? 0.0f : (raised(one, one.d - shift) - s * one.p) / (1.0f + s) * one.slope;
      g = isnan(mean) ? mean : g;
    }
    if (v < problem.width) {
      gradient[first + v] = G(g * problem.grad_scale);
    }
    sum += abs(g);
    const float absmax = simd_max(isnan(g) ? INFINITY : abs(g));
    if (lane == 0) {
      tile_absmax[long(row) * ((problem.width + MAP_WIDTH - 1) / MAP_WIDTH) + base / MAP_WIDTH] = absmax;
    }
  }
  sum = threadgroup_sum(sum, slots, simd, lane);
  if (me == 0) {
    row_l1[row] = sum;
    kl[row] = shift - mean + log_total;
    lse[row] = rows.lse_model + shift + log_total;
    entropy[row] = log_total - of_row / (1.0f + s);
  }
}

}  // namespace metalens
