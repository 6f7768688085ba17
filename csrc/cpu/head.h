// The unembedding of a model, as the kernels read it.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace metalens::cpu {

// A frozen head: logits softcap(scale * (U n + bias)) for the first `vocab` rows of U. Rows beyond are padding and are never predicted.
struct Head {
  Matrix u;
  const float* bias;  // [vocab], or null
  float scale;
  float softcap;  // 0: none
  int64_t vocab;
};

}  // namespace metalens::cpu
