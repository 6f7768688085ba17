// Products on Arm's dot product of bfloat16 pairs: the register tile of multiply.h with two terms to a step. The left is [rows][depth / 2] pairs, a
// panel [depth / 2][8 columns] pairs. If the depth is odd, the second value of the last pair is zero in both.
#pragma once

#include "cpu/isa/panels.h"

namespace metalens::cpu::METALENS_ISA {

constexpr int64_t kPairColumns = 8;

inline int64_t pairs_of(int64_t depth) {
  return (depth + 1) / 2;
}

int64_t pair_left_bytes(int64_t rows, int64_t depth) {
  return rows * pairs_of(depth) * 2 * int64_t(sizeof(uint16_t));
}

void pack_pair_left(const float* a, int64_t lda, int64_t rows, int64_t depth, void* left) {
  uint16_t* out = static_cast<uint16_t*>(left);
  for (int64_t m = 0; m < rows; ++m, out += 2 * pairs_of(depth)) {
    store(Element::bf16, a + m * lda, out, depth);
    if (depth % 2) out[depth] = 0;
  }
}

// The index in a panel of the value of column j at depth k.
inline int64_t panel_index(int64_t k, int64_t j) {
  return (k / 2 * kPairColumns + j) * 2 + k % 2;
}

inline void pad_panel(int64_t depth, uint16_t* panel) {
  for (int64_t j = 0; depth % 2 && j < kPairColumns; ++j) panel[panel_index(depth, j)] = 0;
}

void pack_pair_rows(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, void* out) {
  uint16_t* panel = static_cast<uint16_t*>(out);
  float values[kReductionBlock];
  uint16_t narrow[kReductionBlock];
  for (int64_t j = 0; j < kPairColumns; ++j) {
    if (j < width) {
      unpack(w, column + j, start, depth, values);
      store(Element::bf16, values, narrow, depth);
    }
    for (int64_t k = 0; k < depth; ++k) panel[panel_index(k, j)] = j < width ? narrow[k] : 0;
  }
  pad_panel(depth, panel);
}

void pack_pair_columns(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, void* out) {
  uint16_t* panel = static_cast<uint16_t*>(out);
  float values[kPairColumns];
  for (int64_t k = 0; k < depth; ++k) {
    unpack(w, start + k, column, width, values);
    for (int64_t j = 0; j < kPairColumns; ++j) panel[panel_index(k, j)] = j < width ? narrow_bf16(values[j]) : 0;
  }
  pad_panel(depth, panel);
}

template <int rows>
inline void pair_tile(const uint16_t* a, const uint16_t* panel, int64_t pairs, float* c, int64_t ldc, int64_t width, bool accumulate) {
  float32x4_t acc[rows][2];
  for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = vdupq_n_f32(0);
  for (int64_t p = 0; p < pairs; ++p, panel += 2 * kPairColumns) {
    const bfloat16x8_t b0 = vreinterpretq_bf16_u16(vld1q_u16(panel));
    const bfloat16x8_t b1 = vreinterpretq_bf16_u16(vld1q_u16(panel + kPairColumns));
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, a + (r * pairs + p) * 2, sizeof(pair));
      const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
      acc[r][0] = vbfdotq_f32(acc[r][0], b0, x);
      acc[r][1] = vbfdotq_f32(acc[r][1], b1, x);
    }
  }
  for (int r = 0; r < rows; ++r, c += ldc) {
    float all[kPairColumns];
    vst1q_f32(all, acc[r][0]);
    vst1q_f32(all + 4, acc[r][1]);
    for (int64_t j = 0; j < width; ++j) c[j] = accumulate ? c[j] + all[j] : all[j];
  }
}

void multiply_pairs(const void* left, int64_t rows, const void* packed, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate) {
  const uint16_t* a = static_cast<const uint16_t*>(left);
  const uint16_t* panel = static_cast<const uint16_t*>(packed);
  const int64_t pairs = pairs_of(depth), stride = 2 * pairs;
  int64_t m = 0;
  for (; m + METALENS_ROWS <= rows; m += METALENS_ROWS) {
    pair_tile<METALENS_ROWS>(a + m * stride, panel, pairs, c + m * ldc, ldc, width, accumulate);
  }
  for (; m + 4 <= rows; m += 4) pair_tile<4>(a + m * stride, panel, pairs, c + m * ldc, ldc, width, accumulate);
  for (; m < rows; ++m) pair_tile<1>(a + m * stride, panel, pairs, c + m * ldc, ldc, width, accumulate);
}

constexpr Multiplier kNeonDotMultiplier{
    .panel_width = kPairColumns,
    .left_bytes = pair_left_bytes,
    .panel_bytes = kReductionBlock * kPairColumns * int64_t(sizeof(uint16_t)),
    .pack_left = pack_pair_left,
    .pack_rows = pack_pair_rows,
    .pack_columns = pack_pair_columns,
    .multiply = multiply_pairs,
};

}  // namespace metalens::cpu::METALENS_ISA
