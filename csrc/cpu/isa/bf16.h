// Operands as bfloat16, two to a 32-bit word: what amx.h and dot_avx512.h multiply. An operand has one `part`, its value rounded to nearest even, or
// two: the second holds what the rounding left, so that the parts' sum keeps 16 bits of mantissa.
//
// A panel is [depth / 32][2 halves][16 pairs][16 columns] of words. A word holds two neighbors along the depth, the earlier one in its low half; a
// half of 16 pairs is what one tile of a matrix unit takes. Depth is padded with zeros. The second part of a panel lies behind the first.
//
// C casts convert between the vectors here and the types of the intrinsics, whose definitions differ between compilers.
#pragma once

#include "cpu/isa/panels.h"

namespace metalens::cpu::METALENS_ISA {

static_assert(kVector == 16, "a row of a tile is a vector of sixteen words");

using uvec = uint32_t __attribute__((vector_size(64), aligned(4)));
using hvec = uint16_t __attribute__((vector_size(64), aligned(4)));

constexpr int64_t kStep = 32;        // depth of a tile
constexpr int64_t kTileWords = 256;  // 16 x 16
constexpr int64_t kPanelColumns = 32;
constexpr int64_t kPanelWords = kReductionBlock / kStep * 2 * kTileWords;

inline int64_t steps_of(int64_t depth) {
  return (depth + kStep - 1) / kStep;
}

inline uvec load_words(const uint32_t* p) {
  return *reinterpret_cast<const uvec*>(p);
}

inline void store_words(uint32_t* p, uvec v) {
  *reinterpret_cast<uvec*>(p) = v;
}

// ---- Rounding. The CPU's own conversion flushes subnormal numbers to zero; the products do so whichever conversion made the operands.

// bfloat16 in the upper half of each word; the lower half is not cleared. NaN stays NaN.
inline uvec rounded(vec v) {
  const uvec bits = reinterpret_cast<uvec>(v);
  const uvec nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v != v ? bits | 0x400000u : nearest;
}

// The value that goes into a part: v itself, or what is left of v once part 0 is rounded off. (For an infinite v that is NaN.)
template <int part>
inline vec part_of(vec v) {
  if constexpr (part == 0) {
    return v;
  } else {
    return v - reinterpret_cast<vec>(rounded(v) & 0xffff0000u);
  }
}

// 32 values as 16 words, in their order.
template <int... lane>
inline uvec in_order(vec first, vec second, Lanes<lane...>) {
#ifdef __AVX512BF16__
  return (uvec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const hvec upper = reinterpret_cast<hvec>(rounded(first)), lower = reinterpret_cast<hvec>(rounded(second));
  return reinterpret_cast<uvec>(__builtin_shufflevector(upper, lower, (2 * lane + 1)..., (2 * lane + 33)...));
#endif
}

template <int part>
inline uvec narrow_step(const float* values) {
  return in_order(part_of<part>(load_vec(values)), part_of<part>(load_vec(values + 16)), lanes_below<16>());
}

// Words whose i-th holds even[i] and odd[i].
inline uvec in_pairs(vec even, vec odd) {
#ifdef __AVX512BF16__
  const hvec both = (hvec)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return reinterpret_cast<uvec>(__builtin_shufflevector(
      both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#else
  return (rounded(odd) & 0xffff0000u) | (rounded(even) >> 16);
#endif
}

// The next 32 values, or fewer at the end of a row and zeros behind them.
template <int part>
inline uvec narrow_some(const float* values, int64_t left) {
  if (left >= kStep) return narrow_step<part>(values);
  float rest[kStep] = {};
  __builtin_memcpy(rest, values, left * sizeof(float));
  return narrow_step<part>(rest);
}

// Write one row [depth] of values as words. Each step of 32 values lies `stride` words behind the one before it; zeros fill up the last step.
template <int part>
inline void narrow_row(const float* values, int64_t depth, uint32_t* words, int64_t stride) {
  for (int64_t k = 0; k < depth; k += kStep, words += stride) store_words(words, narrow_some<part>(values + k, depth - k));
}

// ---- Panels

// The words that hold values k and k + 1 along the depth, for one half of the columns; k is even.
inline uint32_t* panel_row(uint32_t* panel, int64_t k, int half) {
  return panel + (k / kStep * 2 + half) * kTileWords + k % kStep / 2 * 16;
}

template <int parts>
inline void store_pairs(uint32_t* words, vec even, vec odd) {
  store_words(words, in_pairs(even, odd));
  if constexpr (parts == 2) store_words(words + kPanelWords, in_pairs(part_of<1>(even), part_of<1>(odd)));
}

// Write zeros from k to the end of its step.
template <int parts>
inline void fill_step(uint32_t* panel, int64_t k, int half) {
  for (k += k % 2; k % kStep; k += 2) store_pairs<parts>(panel_row(panel, k, half), vec{}, vec{});
}

inline bool is_affine(const Matrix& w, int bits) {
  return w.format == Format::affine && w.bits == bits;
}

// The scales or biases of one group in sixteen rows: element first[lane] + group in each lane.
inline vec of_sixteen_rows(Element e, const void* values, const int64_t* first, int64_t group) {
  float wide[16];
  if (e == Element::f32) {
    for (int lane = 0; lane < 16; ++lane) wide[lane] = static_cast<const float*>(values)[first[lane] + group];
    return load_vec(wide);
  }
  unsigned char raw[32];
  for (int lane = 0; lane < 16; ++lane) __builtin_memcpy(raw + 2 * lane, offset(values, 2 * (first[lane] + group)), 2);
#ifdef __F16C__
  if (e == Element::f16) {
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_ps(wide + 8 * half, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(raw) + half)));
    }
    return load_vec(wide);
  }
#endif
  if (e == Element::f16) {
    load(Element::f16, raw, wide, 16);
  } else {
    load(Element::bf16, raw, wide, 16);
  }
  return load_vec(wide);
}

// Load up to sixteen words from any address; the others are zero.
inline uvec load_some_words(const void* from, int64_t words) {
  uvec v{};
  if (words >= 16) {
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
  }
#ifdef __AVX512F__
  return (uvec)_mm512_maskz_loadu_epi32(__mmask16((1 << words) - 1), from);
#else
  for (int64_t i = 0; i < words; ++i) __builtin_memcpy(reinterpret_cast<char*>(&v) + 4 * i, offset(from, 4 * i), 4);
  return v;
#endif
}

// Pack the affine codes of sixteen rows, a row in each lane. Transposing the codes, four or eight to a word, is less work than transposing the
// values.
template <int parts, int bits>
inline void pack_code_rows(const Matrix& w, int64_t column, int64_t rows, int64_t start, int64_t depth, int half, uint32_t* panel) {
  constexpr int64_t kCodes = 32 / bits;  // in a word
  constexpr int kMask = (1 << bits) - 1;
  const int64_t groups = w.cols / w.group_size;
  const uint8_t* codes[16];
  int64_t first_group[16];
  for (int lane = 0; lane < 16; ++lane) {
    const int64_t row = column + smaller(lane, rows - 1);
    codes[lane] = static_cast<const uint8_t*>(w.values) + (row * w.cols + start) / kCodes * 4;
    first_group[lane] = row * groups;
  }
  vec scale{}, bias{};
  int64_t group_end = 0;
  for (int64_t k = 0; k < depth;) {
    uvec words[16];
    const int64_t count = smaller(16, (depth - k) / kCodes);
    for (int lane = 0; lane < 16; ++lane) words[lane] = load_some_words(codes[lane] + k / kCodes * 4, count);
    transpose(words);
    for (int64_t i = 0; i < count; ++i, k += kCodes) {
      if (k >= group_end) {
        const int64_t group = (start + k) / w.group_size;
        scale = of_sixteen_rows(w.element, w.scales, first_group, group);
        bias = of_sixteen_rows(w.element, w.biases, first_group, group);
        group_end = (group + 1) * w.group_size - start;
      }
      const ivec together = reinterpret_cast<ivec>(words[i]);
      uint32_t* out = panel_row(panel, k, half);
#pragma GCC unroll 4
      for (int pair = 0; pair < kCodes / 2; ++pair) {
        const vec even = __builtin_convertvector((together >> (2 * bits * pair)) & kMask, vec);
        const vec odd = __builtin_convertvector((together >> (2 * bits * pair + bits)) & kMask, vec);
        store_pairs<parts>(out + 16 * pair, even * scale + bias, odd * scale + bias);
      }
    }
  }
  fill_step<parts>(panel, depth, half);
}

// Pack sixteen rows of dense bfloat16, whose neighbors along the depth are words as they lie in memory.
inline void pack_bf16_rows(const Matrix& w, int64_t column, int64_t rows, int64_t start, int64_t depth, int half, uint32_t* panel) {
  const uint16_t* values[16];
  for (int lane = 0; lane < 16; ++lane) values[lane] = static_cast<const uint16_t*>(w.values) + (column + smaller(lane, rows - 1)) * w.cols + start;
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t count = smaller(kStep, depth - k);
    uvec tile[16];
    for (int lane = 0; lane < 16; ++lane) {
      tile[lane] = load_some_words(values[lane] + k, count / 2);
      if (count % 2) tile[lane][count / 2] = values[lane][k + count - 1];
    }
    transpose(tile);
    uint32_t* out = panel_row(panel, k, half);
    for (int i = 0; i < 16; ++i) store_words(out + i * 16, tile[i]);
  }
}

// Pack sixteen rows of any matrix: words along the depth, then transposed.
template <int parts>
inline void pack_any_rows(const Matrix& w, int64_t column, int64_t rows, int64_t start, int64_t depth, int half, uint32_t* panel) {
  const FloatRows from(w, column, rows, start, depth);
  const auto pack_step = [&]<int part>(int64_t k) {
    uvec tile[16];
    for (int lane = 0; lane < 16; ++lane) tile[lane] = narrow_some<part>(from.values[lane] + k, depth - k);
    transpose(tile);
    uint32_t* out = panel_row(panel + part * kPanelWords, k, half);
    for (int i = 0; i < 16; ++i) store_words(out + i * 16, tile[i]);
  };
  for (int64_t k = 0; k < depth; k += kStep) {
    pack_step.template operator()<0>(k);
    if constexpr (parts == 2) pack_step.template operator()<1>(k);
  }
}

template <int parts>
inline auto row_packer(const Matrix& w) {
  if (is_affine(w, 4)) return pack_code_rows<parts, 4>;
  if (is_affine(w, 8)) return pack_code_rows<parts, 8>;
  if (parts == 1 && w.format == Format::dense && w.element == Element::bf16) return pack_bf16_rows;
  return pack_any_rows<parts>;
}

template <int parts>
void pack_word_rows(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, void* out) {
  uint32_t* panel = static_cast<uint32_t*>(out);
  const auto pack = row_packer<parts>(w);
  for (int half = 0; half * 16 < width; ++half) {
    pack(w, column + half * 16, smaller(16, width - half * 16), start, depth, half, panel);
  }
}

// Sixteen 4-bit codes of one row.
inline vec four_bit_codes(const uint8_t* p) {
  uint32_t words[2];
  __builtin_memcpy(words, p, sizeof(words));
  const uvec low = uvec{} + words[0], high = uvec{} + words[1];
  constexpr ivec shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  const uvec both = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
  return __builtin_convertvector((reinterpret_cast<ivec>(both) >> shifts) & 15, vec);
}

// Unpack columns [column, column + width) of one row into two vectors. Lanes beyond them are zero or, for a quantized matrix, hold the rest of a unit
// of eight columns.
inline void unpack_columns(const Matrix& w, int64_t row, int64_t column, int64_t width, vec* out) {
  if (is_affine(w, 4) && width == kPanelColumns && column % 32 == 0 && w.group_size % 32 == 0) {
    const int64_t at = row * w.cols + column;
    const Group g = group_at<Format::affine>(w, at / w.group_size);
    const uint8_t* codes = static_cast<const uint8_t*>(w.values) + at / 2;
    for (int half = 0; half < 2; ++half) out[half] = four_bit_codes(codes + 8 * half) * g.scale + g.bias;
    return;
  }
  if (w.format == Format::dense && w.element == Element::f32 && width == kPanelColumns) {
    const float* values = static_cast<const float*>(w.values) + row * w.cols + column;
    for (int half = 0; half < 2; ++half) out[half] = load_vec(values + 16 * half);
    return;
  }
  float values[kPanelColumns] = {};
  unpack(w, row, column, w.format == Format::dense ? width : (width + 7) / 8 * 8, values);
  for (int half = 0; half < 2; ++half) out[half] = load_vec(values + 16 * half);
}

template <int parts>
void pack_word_columns(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, void* out) {
  uint32_t* panel = static_cast<uint32_t*>(out);
  for (int64_t k = 0; k < depth; k += 2) {
    vec even[2], odd[2] = {};
    unpack_columns(w, start + k, column, width, even);
    if (k + 1 < depth) unpack_columns(w, start + k + 1, column, width, odd);
    for (int half = 0; half < 2; ++half) store_pairs<parts>(panel_row(panel, k, half), even[half], odd[half]);
  }
  for (int half = 0; half < 2; ++half) fill_step<parts>(panel, depth, half);
}

}  // namespace metalens::cpu::METALENS_ISA
