// Products on AVX-512's dot product of bfloat16 pairs: the register tile of multiply.h with two terms to a step. The left is [rows][depth / 2] words,
// its depth padded to a multiple of 32.
//
// With METALENS_SOFTWARE_DOT the instruction is plain C++ that follows Intel's definition exactly, so that the code built on it runs on any machine.
#pragma once

#include "cpu/isa/bf16.h"

namespace metalens::cpu::METALENS_ISA {

#ifdef METALENS_SOFTWARE_DOT

// Subnormal numbers count as zero, as operands and as results.
inline float flushed(float f) {
  return __builtin_fabsf(f) < 0x1p-126f ? __builtin_copysignf(0.0f, f) : f;
}

inline float flushed_bf16(uint32_t half) {
  return flushed(widen_bf16(uint16_t(half)));
}

// sum[i] + a . b[i], which adds the odd term first, then the even one.
inline vec dot_pairs(vec sum, uint32_t a, uvec b) {
  for (int i = 0; i < 16; ++i) {
    const float odd = flushed(__builtin_fmaf(flushed_bf16(a >> 16), flushed_bf16(b[i] >> 16), flushed(sum[i])));
    sum[i] = flushed(__builtin_fmaf(flushed_bf16(a), flushed_bf16(b[i]), odd));
  }
  return sum;
}

#else

inline vec dot_pairs(vec sum, uint32_t a, uvec b) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(uvec{} + a), (__m512bh)b);
}

#endif

int64_t dot_left_bytes(int64_t rows, int64_t depth) {
  return rows * steps_of(depth) * 16 * int64_t(sizeof(uint32_t));
}

void pack_dot_left(const float* a, int64_t lda, int64_t rows, int64_t depth, void* left) {
  uint32_t* words = static_cast<uint32_t*>(left);
  const int64_t stride = steps_of(depth) * 16;
  for (int64_t m = 0; m < rows; ++m) narrow_row<0>(a + m * lda, depth, words + m * stride, 16);
}

template <int rows>
inline void dot_tile(const uint32_t* a, const uint32_t* panel, int64_t steps, float* c, int64_t ldc, int64_t width, bool accumulate) {
  vec acc[rows][2];
  for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = vec{};
  for (int64_t step = 0; step < steps; ++step, a += 16, panel += 2 * kTileWords) {
    for (int pair = 0; pair < 16; ++pair) {
      const uvec b0 = load_words(panel + pair * 16);
      const uvec b1 = load_words(panel + pair * 16 + kTileWords);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const uint32_t x = a[r * steps * 16 + pair];
        acc[r][0] = dot_pairs(acc[r][0], x, b0);
        acc[r][1] = dot_pairs(acc[r][1], x, b1);
      }
    }
  }
  for (int r = 0; r < rows; ++r, c += ldc) {
    if (width == kPanelColumns) {
      store_vec(c, accumulate ? load_vec(c) + acc[r][0] : acc[r][0]);
      store_vec(c + 16, accumulate ? load_vec(c + 16) + acc[r][1] : acc[r][1]);
    } else {
      for (int64_t j = 0; j < width; ++j) {
        const float v = acc[r][j / 16][j % 16];
        c[j] = accumulate ? c[j] + v : v;
      }
    }
  }
}

// The rows that are left over at the end, at most `most`, in one tile.
template <int most>
inline void last_dot_tile(
    int64_t rows, const uint32_t* a, const uint32_t* panel, int64_t steps, float* c, int64_t ldc, int64_t width, bool accumulate) {
  if constexpr (most > 0) {
    if (rows == most) return dot_tile<most>(a, panel, steps, c, ldc, width, accumulate);
    last_dot_tile<most - 1>(rows, a, panel, steps, c, ldc, width, accumulate);
  }
}

void multiply_dots(const void* left, int64_t rows, const void* packed, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate) {
  const uint32_t* a = static_cast<const uint32_t*>(left);
  const uint32_t* panel = static_cast<const uint32_t*>(packed);
  const int64_t steps = steps_of(depth), stride = steps * 16;
  int64_t m = 0;
  for (; m + METALENS_ROWS <= rows; m += METALENS_ROWS) {
    dot_tile<METALENS_ROWS>(a + m * stride, panel, steps, c + m * ldc, ldc, width, accumulate);
  }
  last_dot_tile<METALENS_ROWS - 1>(rows - m, a + m * stride, panel, steps, c + m * ldc, ldc, width, accumulate);
}

constexpr Multiplier kDotMultiplier{
    .panel_width = kPanelColumns,
    .left_bytes = dot_left_bytes,
    .panel_bytes = kPanelWords * int64_t(sizeof(uint32_t)),
    .pack_left = pack_dot_left,
    .pack_rows = pack_word_rows<1>,
    .pack_columns = pack_word_columns<1>,
    .multiply = multiply_dots,
};

}  // namespace metalens::cpu::METALENS_ISA
