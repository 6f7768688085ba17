// KL(model || lens) with its gradient, in one pass over the vocabulary that stores no logits: the delta form.
//
// A row n of a lens and the model's own row n* for the same token give logits z = lse* + lp + d and z* = lse* + lp. Here lp is the model's
// log-probability and d the difference of the logits. It is computed from n - n*, so its error is relative to the difference, and a lens that is
// nearly right is compared as exactly as any other. With any shift c near lse - lse*, e = exp(lp + d - c), p = exp(lp) and g = e - p:
//   S = sum e = 1 + sum g      KL = log S - sum p (d - c)      dKL/dz = q - p = (g + (1 - S) p) / S
// A small KL is summed as the terms g - p (d - c), all of one sign, plus log S - (S - 1), so that its errors are small too. With A = sum g U and the
// model's mean row m = sum p U, the gradient is dKL/dn = scale (A + (1 - S) m) / S. For a linear head, c = scale m . (n - n*) is at most KL below
// lse - lse*, and no second pass is needed. A softcap bends each logit by a slope of its own, which m does not contain: there a first pass finds lse,
// so that S = 1 and m drops out.
//
// An offset o of the logits, as for a sample of the vocabulary, is in both z and z*: d does not see it, nor does the slope of a softcap, which bends
// the logits before the offset is added. It enters lp = z* - lse* alone, once for each token and not for each lens. An id with o = -inf has p = 0 and
// adds nothing.
//
// With 16-bit operands the model's rows are multiplied in two parts, because lp enters every row and all layers share it; the differences in one
// part.
#pragma once

#include <cstdint>

#include "cpu/head.h"
#include "cpu/precision.h"

namespace metalens::cpu {

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
