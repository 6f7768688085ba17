// Statistics of rows of logits, in one pass over the vocabulary that never stores the logits.
#pragma once

#include <cstdint>

#include "cpu/head.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// The rows of `layers` layers for `tokens` tokens. A row whose logits hold NaN is NaN in every float of the output.
struct LensStatsInput {
  int64_t layers;
  int64_t tokens;
  const float* n;         // [layers, tokens, D], after the final norm
  const float* n_model;   // [tokens, D] the model's own, or null
  const int32_t* labels;  // [tokens, labels_per_token] ids, or null
  int64_t labels_per_token;
  int64_t k;        // 1 <= k <= vocab
  bool reverse_kl;  // also compute KL(lens || model)
};

// Arrays [layers, tokens]; top_* are [layers, tokens, k], by falling logit, equal logits by rising id; nll and rank are [layers, tokens,
// labels_per_token]. kl, reverse_kl and agrees need n_model, nll and rank need labels; without them they are null.
struct LensStatsOutput {
  float* lse;
  float* entropy;
  float* max_probability;
  int32_t* top_ids;
  float* top_logits;
  float* kl;
  bool* agrees;
  float* reverse_kl;
  float* nll;
  int32_t* rank;
};

// A label outside the vocabulary has NaN for its nll and -1 for its rank.
void lens_stats(const Head& head, const LensStatsInput& in, Precision precision, const LensStatsOutput& out);

}  // namespace metalens::cpu
