// The unembedding of a model, as the kernels read it.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace metalens::cpu {

// A frozen head: logits softcap(scale * (U n + bias)) + offset for the first `vocab` rows of U. Rows beyond are padding and are never predicted.
struct Head {
  Matrix u;
  const float* bias;  // [vocab], or null
  float scale;
  float softcap;  // 0: none
  int64_t vocab;
  const float* offset = nullptr;  // [vocab], or null
};

// Turn the products z of ids first ... first + n - 1 into logits.
inline void to_logits(const Head& head, int64_t first, float* z, int64_t n) {
  kernels().transform(z, head.bias ? head.bias + first : nullptr, n, head.scale, head.softcap);
  if (head.offset) kernels().transform(z, head.offset + first, n, 1, 0);
}

}  // namespace metalens::cpu
