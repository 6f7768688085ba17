// Scaled dot-product attention without the [queries, keys] matrix: one pass over the keys with a running softmax.
#pragma once

#include <cstdint>

#include "cpu/precision.h"

namespace metalens::cpu {

struct AttentionInput {
  int64_t batch, heads, kv_heads, queries, keys;
  int64_t d;        // of queries and keys
  int64_t d_value;  // of values and the result
  const float* q;   // [batch, heads, queries, d]
  const float* k;   // [batch, kv_heads, keys, d]; heads is a multiple of kv_heads
  const float* v;   // [batch, kv_heads, keys, d_value]
  float scale;
  bool causal;        // query i sees the keys up to i + keys - queries
  const float* mask;  // [queries, keys], added to the scaled products; or null
};

// out [batch, heads, queries, d_value]. A query that sees no key has NaN.
void attention(const AttentionInput& in, Precision precision, float* out);

}  // namespace metalens::cpu
