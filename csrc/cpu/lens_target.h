// The model's own prediction, with which lens_kl compares a lens: computed once for all layers.
#pragma once

#include <cstdint>

#include "cpu/head.h"
#include "cpu/precision.h"

namespace metalens::cpu {

struct LensTargetOutput {
  float* lse;      // [tokens], of the model's logits
  float* entropy;  // [tokens]
  float* mean;     // [tokens, D], the mean row of U under the model's probabilities; null if not wanted
};

// n_model [tokens, D]: the model's rows after the final norm.
void lens_target(const Head& head, const float* n_model, int64_t tokens, Precision precision, const LensTargetOutput& out);

}  // namespace metalens::cpu
