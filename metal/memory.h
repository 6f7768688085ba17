// Loads and stores of several neighboring elements at a time.
//
// A packed vector needs only the alignment of its elements, so rows of any length can be read with it. Threadgroup memory is declared as float4,
// and the rows of tiles are multiples of 16 bytes, so stores to it use aligned vectors of 16 bytes.
#pragma once

#include "common.h"

namespace metalens {

METAL_FUNC float4 load_four(const device float* from) {
  return float4(*reinterpret_cast<const device packed_float4*>(from));
}

METAL_FUNC float4 load_four(const device half* from) {
  return float4(half4(*reinterpret_cast<const device packed_half4*>(from)));
}

// A bfloat is the upper half of a float.
METAL_FUNC float4 load_four(const device bfloat* from) {
  const ushort4 bits = ushort4(*reinterpret_cast<const device packed_ushort4*>(from));
  return float4(
      as_type<float>(uint(bits.x) << 16), as_type<float>(uint(bits.y) << 16), as_type<float>(uint(bits.z) << 16), as_type<float>(uint(bits.w) << 16));
}

// Load four elements of a row from `column` on, zeros from `end` on. Inside the row this costs one test.
template <typename T>
METAL_FUNC float4 load_four(const device T* row, int column, int end) {
  if (column + 4 <= end) {
    return load_four(row + column);
  }
  return float4(
      column < end ? float(row[column]) : 0.0f, column + 1 < end ? float(row[column + 1]) : 0.0f, column + 2 < end ? float(row[column + 2]) : 0.0f,
      0.0f);
}

template <typename T>
METAL_FUNC void load_eight(const device T* row, int column, int end, thread float* unit) {
  const float4 low = load_four(row, column, end);
  const float4 high = load_four(row, column + 4, end);
  unit[0] = low.x;
  unit[1] = low.y;
  unit[2] = low.z;
  unit[3] = low.w;
  unit[4] = high.x;
  unit[5] = high.y;
  unit[6] = high.z;
  unit[7] = high.w;
}

METAL_FUNC void store_four(float4 four, device float* to) {
  *reinterpret_cast<device packed_float4*>(to) = packed_float4(four);
}

// Store four elements of a row from `column` on, those before `end`.
METAL_FUNC void store_four(float4 four, device float* row, int column, int end) {
  if (column + 4 <= end) {
    store_four(four, row + column);
    return;
  }
  if (column < end) {
    row[column] = four.x;
  }
  if (column + 1 < end) {
    row[column + 1] = four.y;
  }
  if (column + 2 < end) {
    row[column + 2] = four.z;
  }
}

METAL_FUNC float4 load_four(const threadgroup float* from) {
  return *reinterpret_cast<const threadgroup float4*>(from);
}

METAL_FUNC void store_four(float4 four, threadgroup float* to) {
  *reinterpret_cast<threadgroup float4*>(to) = four;
}

METAL_FUNC void store_four(float4 four, threadgroup half* to) {
  *reinterpret_cast<threadgroup half4*>(to) = half4(four);
}

METAL_FUNC void store_unit(thread const float* unit, threadgroup float* to) {
  store_four(float4(unit[0], unit[1], unit[2], unit[3]), to);
  store_four(float4(unit[4], unit[5], unit[6], unit[7]), to + 4);
}

// Eight halves are one store of 16 bytes.
METAL_FUNC void store_unit(thread const float* unit, threadgroup half* to) {
  *reinterpret_cast<threadgroup uint4*>(to) = uint4(
      as_type<uint>(half2(half(unit[0]), half(unit[1]))), as_type<uint>(half2(half(unit[2]), half(unit[3]))),
      as_type<uint>(half2(half(unit[4]), half(unit[5]))), as_type<uint>(half2(half(unit[6]), half(unit[7]))));
}

}  // namespace metalens
