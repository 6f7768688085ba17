// KL divergences, Jensen-Shannon divergence and total variation of two rows of logits, in one pass over the vocabulary that never stores the logits.
//
// The pass needs the log-sum-exp of both rows, which lens_target finds in a pass of its own: the total variation is a sum of |p - q|, and no part of
// it is known before both normalizers are.
#pragma once

#include <cstdint>

#include "cpu/head.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// Rows of one of the two sides: n [layers, tokens, D] after the final norm, and their log-sum-exp [layers, tokens].
struct LensRows {
  int64_t layers;
  const float* n;
  const float* lse;
};

// If b has one layer, it is compared with every layer of a; else both have as many layers.
struct LensCompareInput {
  int64_t tokens;
  LensRows a;
  LensRows b;
};

// Arrays [layers of a, tokens]. A row with NaN is NaN in all of them.
struct LensCompareOutput {
  float* kl;          // KL(a || b)
  float* reverse_kl;  // KL(b || a)
  float* js;          // (KL(a || m) + KL(b || m)) / 2 with m = (a + b) / 2
  float* tv;          // sum |a - b| / 2
};

// Both heads have the same vocabulary. If they are one object, each weight of U is unpacked once for both sides.
void lens_compare(const Head& head_a, const Head& head_b, const LensCompareInput& in, Precision precision, const LensCompareOutput& out);

}  // namespace metalens::cpu
