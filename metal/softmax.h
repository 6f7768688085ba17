// The running softmax of a row and the running comparison of two rows: the state that stands for logits that are never written.
//
// Sums are relative to a reference near the largest logit so far, and are rescaled when a logit exceeds it by more than RISE. The first reference is
// the lowest finite number instead of -inf, because exp(-inf - -inf) would be NaN.
#pragma once

#include "common.h"

namespace metalens {

constexpr constant float LOWEST = -3.402823466e38f;

// A larger reference needs an exponential and a branch for each running maximum; with this tolerance there are few, and the sums stay below e^4 V.
constexpr constant float RISE = 4.0f;

// lse = top + log(sum); entropy = log(sum) - weighted / sum.
struct RunningSoftmax {
  float top;       // the reference: at least the largest logit, less RISE
  float sum;       // of exp(z - top)
  float weighted;  // sum of exp(z - top) (z - top)
  float reverse;   // sum of exp(z - top) d, with d as in RunningComparison; 0 without a comparison
};

// The lens's row, logits z, compared with the model's, logits z*, with d = z - z*:
//   KL(p || q) = log(sum exp z / sum exp z*) - mean of d under p      KL(q || p) = mean of d under q - log(sum exp z / sum exp z*)
// The mean under q is kept in RunningSoftmax, whose reference suits q.
struct RunningComparison {
  float top;    // the reference: at least the largest z*, less RISE
  float sum;    // of exp(z* - top)
  float mean;   // sum of exp(z* - top) d
  float raise;  // sum of exp(z - top) - exp(z* - top), which is small if the rows agree
};

METAL_FUNC RunningSoftmax no_softmax() {
  RunningSoftmax none;
  none.top = LOWEST;
  none.sum = 0.0f;
  none.weighted = 0.0f;
  none.reverse = 0.0f;
  return none;
}

METAL_FUNC RunningComparison no_comparison() {
  RunningComparison none;
  none.top = LOWEST;
  none.sum = 0.0f;
  none.mean = 0.0f;
  none.raise = 0.0f;
  return none;
}

// `d`: z - z*, or 0 without a comparison.
METAL_FUNC void add(thread RunningSoftmax& row, float z, float d) {
  if (z > row.top + RISE) {
    const float factor = precise::exp(row.top - z);
    row.weighted = factor > 0.0f ? factor * (row.weighted + row.sum * (row.top - z)) : 0.0f;
    row.reverse = factor > 0.0f ? factor * row.reverse : 0.0f;
    row.sum *= factor;
    row.top = z;
  }
  const float e = precise::exp(z - row.top);
  row.sum += e;
  row.weighted += e > 0.0f ? e * (z - row.top) : 0.0f;  // 0, not NaN, for z = -inf
  row.reverse += e > 0.0f ? e * d : 0.0f;
}

METAL_FUNC void add(thread RunningComparison& row, float z, float z_model) {
  if (z_model > row.top + RISE) {
    const float factor = precise::exp(row.top - z_model);
    row.sum *= factor;
    row.mean *= factor;
    row.raise *= factor;
    row.top = z_model;
  }
  const float e = precise::exp(z_model - row.top);
  const float d = z - z_model;
  row.sum += e;
  // A token that the model rules out adds nothing to the mean, but its whole weight to the lens's sum.
  row.mean += e > 0.0f ? e * d : 0.0f;
  row.raise += abs(d) < 1.0f ? e * exp_minus_one(d) : precise::exp(z - row.top) - e;
}

METAL_FUNC RunningSoftmax merged(RunningSoftmax a, RunningSoftmax b) {
  RunningSoftmax both;
  both.top = max(a.top, b.top);
  const float of_a = precise::exp(a.top - both.top);
  const float of_b = precise::exp(b.top - both.top);
  both.sum = a.sum * of_a + b.sum * of_b;
  const float shifted_a = of_a > 0.0f ? of_a * (a.weighted + a.sum * (a.top - both.top)) : 0.0f;
  const float shifted_b = of_b > 0.0f ? of_b * (b.weighted + b.sum * (b.top - both.top)) : 0.0f;
  both.weighted = shifted_a + shifted_b;
  both.reverse = (of_a > 0.0f ? of_a * a.reverse : 0.0f) + (of_b > 0.0f ? of_b * b.reverse : 0.0f);
  return both;
}

METAL_FUNC RunningComparison merged(RunningComparison a, RunningComparison b) {
  RunningComparison both;
  both.top = max(a.top, b.top);
  const float of_a = precise::exp(a.top - both.top);
  const float of_b = precise::exp(b.top - both.top);
  both.sum = a.sum * of_a + b.sum * of_b;
  both.mean = a.mean * of_a + b.mean * of_b;
  both.raise = a.raise * of_a + b.raise * of_b;
  return both;
}

// Merge over the lanes whose numbers differ only in the bits from `first` to below `last`, in a fixed order. Each of these lanes has the result.
template <ushort first = 1, ushort last = LANES>
METAL_FUNC RunningSoftmax simd_merged(RunningSoftmax mine) {
  RunningSoftmax all = mine;
  METALENS_UNROLL
  for (ushort step = first; step < last; step *= 2) {
    RunningSoftmax other;
    other.top = simd_shuffle_xor(all.top, step);
    other.sum = simd_shuffle_xor(all.sum, step);
    other.weighted = simd_shuffle_xor(all.weighted, step);
    other.reverse = simd_shuffle_xor(all.reverse, step);
    all = merged(all, other);
  }
  return all;
}

template <ushort first = 1, ushort last = LANES>
METAL_FUNC RunningComparison simd_merged(RunningComparison mine) {
  RunningComparison all = mine;
  METALENS_UNROLL
  for (ushort step = first; step < last; step *= 2) {
    RunningComparison other;
    other.top = simd_shuffle_xor(all.top, step);
    other.sum = simd_shuffle_xor(all.sum, step);
    other.mean = simd_shuffle_xor(all.mean, step);
    other.raise = simd_shuffle_xor(all.raise, step);
    all = merged(all, other);
  }
  return all;
}

METAL_FUNC float lse(RunningSoftmax row) {
  return row.sum == 0.0f ? NAN : row.top + precise::log(row.sum);
}

METAL_FUNC float entropy(RunningSoftmax row) {
  return row.sum == 0.0f ? NAN : precise::log(row.sum) - row.weighted / row.sum;
}

// log(sum exp z / sum exp z*). If the rows nearly agree, it is small, and so is its rounding error. If not, `raise` may have overflowed on the way.
METAL_FUNC float lse_difference(RunningComparison row, RunningSoftmax lens) {
  const float difference = lse(lens) - (row.top + precise::log(row.sum));
  return abs(difference) < 1.0f && isfinite(row.raise) ? log_one_plus(row.raise / row.sum) : difference;
}

METAL_FUNC float kl_divergence(RunningComparison row, RunningSoftmax lens) {
  return lse_difference(row, lens) - row.mean / row.sum;
}

METAL_FUNC float reverse_kl_divergence(RunningComparison row, RunningSoftmax lens) {
  return lens.reverse / lens.sum - lse_difference(row, lens);
}

}  // namespace metalens
