// lens_compare: from two chunks of logits to what compares their predictions: both KL divergences, Jensen-Shannon divergence, total variation.
//
// Each row of a has a threadgroup and takes two passes over it and over its row of b: the log-sum-exp of both, then the sums. No term of the sums is
// negative, and all vanish where the predictions are equal, so a small divergence has a small error. The second pass finds the rows in the cache,
// unless the vocabulary is large.
#pragma once

#include "head.h"
#include "row_group.h"
#include "softmax.h"

namespace metalens {

struct CompareProblem {
  int rows_b;   // row r of a is compared with row r mod rows_b of b
  int width_a;  // logits of a row, padding included
  int width_b;
  int vocab;  // ids below it are tokens
  int with_offset_a;
  int with_offset_b;
  float softcap_a;  // 0: none
  float softcap_b;
};

// A row of products with the head, which become logits when they are read.
struct LogitRow {
  const device float* products;  // [V]
  const device float* offset;    // [V] or nullptr
  float softcap;
};

METAL_FUNC float logit_at(thread const LogitRow& row, int v) {
  const float capped = softcapped(row.products[v], row.softcap);
  return row.offset != nullptr ? capped + row.offset[v] : capped;
}

// The log-sum-exp of the row, in every thread of the threadgroup.
METAL_FUNC float threadgroup_lse(thread const LogitRow& row, int vocab, threadgroup float* slots, uint simd, uint lane) {
  RunningSoftmax mine = no_softmax();
  for (int v = thread_index(simd, lane); v < vocab; v += ROW_THREADS) {
    add(mine, logit_at(row, v), 0.0f);
  }
  RunningSoftmax all = no_softmax();
  all.top = threadgroup_max(mine.top, slots, simd, lane);
  all.sum = threadgroup_sum(mine.sum * precise::exp(mine.top - all.top), slots, simd, lane);
  return lse(all);
}

// Sums over tokens of what is never negative.
struct ComparisonSums {
  float kl;       // q - p - p log(q / p)
  float reverse;  // p - q - q log(p / q)
  float shannon;  // twice the Jensen-Shannon divergence
  float size;     // |q - p|, twice the total variation
};

// p log(2 p / (p + q)) + q log(2 q / (p + q)), with t = log(q / p).
METAL_FUNC float jensen_shannon_term(float p, float q, float t) {
  const float mass = p + q;
  if (abs(t) < 1.0f) {  // log cosh and tanh of t / 2 would cancel: a series in u = tanh(t / 2)
    const float u = p * exp_minus_one(t) / mass;
    const float u2 = u * u;
    float sum = 1.0f / 66.0f;
    sum = fma(sum, u2, 1.0f / 45.0f);
    sum = fma(sum, u2, 1.0f / 28.0f);
    sum = fma(sum, u2, 1.0f / 15.0f);
    sum = fma(sum, u2, 1.0f / 6.0f);
    return mass * u2 * 0.5f * fma(sum, u2, 1.0f);
  }
  const float smaller = min(p, q);
  const float apart = smaller > 0.0f ? smaller * abs(t) : 0.0f;
  return mass * (0.693147181f - precise::log(1.0f + smaller / max(p, q))) - apart;
}

METAL_FUNC void add(thread ComparisonSums& sums, float log_p, float log_q) {
  const float p = precise::exp(log_p);
  const float q = precise::exp(log_q);
  if (p + q == 0.0f) {
    return;  // both rule the token out
  }
  const float t = log_q - log_p;
  const bool near = abs(t) < 1.0f;
  // Where a probability is 0, its logarithm does not count.
  sums.kl += near ? p * exp_beyond_linear(t) : p == 0.0f ? q : q - p - p * t;
  sums.reverse += near ? q * exp_beyond_linear(-t) : q == 0.0f ? p : p - q + q * t;
  sums.shannon += jensen_shannon_term(p, q, t);
  sums.size += near ? abs(p * exp_minus_one(t)) : abs(q - p);
}

METAL_FUNC void lens_compare(
    const device float* a,         // [rows, width_a] products of the head of a
    const device float* b,         // [rows_b, width_b] products of the head of b
    const device float* offset_a,  // [width_a], if there is one
    const device float* offset_b,  // [width_b], if there is one
    const device int* problem_words,
    device float* kl,       // [rows], as are all outputs: KL(p || q) for predictions p of a and q of b
    device float* reverse,  // KL(q || p)
    device float* js,
    device float* tv,
    threadgroup float* slots,
    uint3 group,
    uint simd,
    uint lane) {
  const device CompareProblem& problem = *reinterpret_cast<const device CompareProblem*>(problem_words);
  const int row = int(group.x);
  LogitRow row_a;
  row_a.products = a + long(row) * problem.width_a;
  row_a.offset = problem.with_offset_a != 0 ? offset_a : nullptr;
  row_a.softcap = problem.softcap_a;
  LogitRow row_b;
  row_b.products = b + long(row % problem.rows_b) * problem.width_b;
  row_b.offset = problem.with_offset_b != 0 ? offset_b : nullptr;
  row_b.softcap = problem.softcap_b;
  const float lse_a = threadgroup_lse(row_a, problem.vocab, slots, simd, lane);
  const float lse_b = threadgroup_lse(row_b, problem.vocab, slots, simd, lane);

  ComparisonSums sums;
  sums.kl = 0.0f;
  sums.reverse = 0.0f;
  sums.shannon = 0.0f;
  sums.size = 0.0f;
  for (int v = thread_index(simd, lane); v < problem.vocab; v += ROW_THREADS) {
    add(sums, logit_at(row_a, v) - lse_a, logit_at(row_b, v) - lse_b);
  }
  sums.kl = threadgroup_sum(sums.kl, slots, simd, lane);
  sums.reverse = threadgroup_sum(sums.reverse, slots, simd, lane);
  sums.shannon = threadgroup_sum(sums.shannon, slots, simd, lane);
  sums.size = threadgroup_sum(sums.size, slots, simd, lane);
  if (simd == 0 && lane == 0) {
    kl[row] = sums.kl;
    reverse[row] = sums.reverse;
    js[row] = sums.shannon / 2.0f;
    tv[row] = sums.size / 2.0f;
  }
}

}  // namespace metalens
