// KL(model || lens) with its gradient, in one pass over the vocabulary that stores no logits: the delta form.
//
// A row n of a lens and the model's own n* for the same token give logits z = lse* + lp + d and z* = lse* + lp, where lp is the model's
// log-probability and d the difference, computed from n - n*: its error is relative to the difference, so it is as exact where the lens is nearly
// right as elsewhere. With any shift c near lse - lse*, e = exp(lp + d - c), p = exp(lp) and g = e - p:
//   S = sum e = 1 + sum g      KL = log S - sum p (d - c)      dKL/dz = q - p = (g + (1 - S) p) / S
// where a small KL is summed as g - p (d - c), all of one sign, plus log S - (S - 1), so that its errors are small too. Hence
// with A = sum g U and the model's mean row m = sum p U, dKL/dn = scale (A + (1 - S) m) / S. For a linear head c = scale m . (n - n*) is at most
// KL below lse - lse*, and no second pass is needed. A softcap bends each logit by its own slope, which m does not know: there a first pass finds
// lse, so that S = 1 and m drops out.
//
// With 16-bit operands the model's rows are multiplied in two parts (lp enters every row, and all layers share it), the differences in one.
#pragma once

#include <cstdint>

#include "cpu/product.h"

namespace metalens::cpu {

// lse [tokens] of the model's logits, entropy [tokens], and, unless null, the mean row of U under the model's probabilities [tokens, D].
struct LensTargetOutput {
  float* lse;
  float* entropy;
  float* mean;
};

// n_model [tokens, D]: the model's rows after the final norm.
void lens_target(const Head& head, const float* n_model, int64_t tokens, Precision precision, const LensTargetOutput& out);

struct LensKLInput {
  int64_t layers;
  int64_t tokens;
  const float* n;        // [layers, tokens, D]
  const float* n_model;  // [tokens, D]
  const float* lse;      // [tokens], of lens_target
  const float* mean;     // [tokens, D], of lens_target; null with a softcap
};

// kl [layers, tokens]; dn [layers, tokens, D], or null for the loss alone.
void lens_kl(const Head& head, const LensKLInput& in, Precision precision, float* kl, float* dn);

}  // namespace metalens::cpu
