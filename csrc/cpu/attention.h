// Scaled dot-product attention without the [queries, keys] matrix: one pass over the keys with a running softmax.
#pragma once

#include <cstdint>

#include "cpu/precision.h"
#include "cpu/strided.h"

namespace metalens::cpu {

// What is added to the scaled products, for every head and query; or which keys are visible. Strides are in elements and may be zero.
struct AttentionMask {
  const void* data = nullptr;  // null = all keys are visible
  bool booleans = false;       // true = visible; else numbers of type `element`
  Element element = Element::f32;
  int64_t strides[4] = {};  // along [batch, heads, queries, keys]
};

struct AttentionInput {
  int64_t batch, heads, kv_heads, queries, keys;
  StridedRows q;  // [batch, heads, queries, d]
  StridedRows k;  // [batch, kv_heads, keys, d]; heads is a multiple of kv_heads
  StridedRows v;  // [batch, kv_heads, keys, d_value]
  float scale;
  bool causal;  // query i sees the keys up to i + keys - queries
  AttentionMask mask;
  const float* sinks;  // [heads]: the logit of one more key, whose value is zero; or null
};

// out [batch, queries, heads, d_value]: as the product that follows reads it. A query that sees no key has NaN.
void attention(const AttentionInput& in, Precision precision, const Output& out);

}  // namespace metalens::cpu
