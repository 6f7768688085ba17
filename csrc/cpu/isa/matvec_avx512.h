// Matrix-vector products with the rows of a frozen matrix on AVX-512. They take three to four instructions for sixteen weights, and five for e4m3, so
// that multiplying a matrix takes about as long as reading it.
#pragma once

#include "cpu/isa/aligned_rows.h"
#include "cpu/isa/code_words_avx512.h"

namespace metalens::cpu::METALENS_ISA {

// Up to sixteen elements, widened; the other lanes are zero and are not read.
inline __m512 load_elements(Element e, const void* values, int64_t at, int64_t n) {
  const __mmask16 lanes = first_lanes(n);
  if (e == Element::f32)
    return n >= 16 ? _mm512_loadu_ps(static_cast<const float*>(values) + at) : _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(values) + at);
  const auto* from = static_cast<const uint16_t*>(values) + at;
  const __m256i halves = n >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi16(lanes, from);
  if (e == Element::f16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// e4m3 codes, sign-extended to 16 bits, as float16, in which their bits mean 2^-8 of the value, also for subnormal numbers. The codes of NaN become
// numbers.
constexpr float kE4m3Factor = 256.0f;

inline __m512i e4m3_halves(__m512i codes) {
  return _mm512_and_si512(_mm512_slli_epi16(codes, 7), _mm512_set1_epi16(short(0xbfff)));
}

// The scales of up to sixteen groups; the other lanes are finite and are not read.
template <Format format>
inline __m512 load_scales(const Matrix& w, int64_t group, int64_t n) {
  if constexpr (format == Format::affine) return load_elements(w.element, w.scales, group, n);
  const auto* from = static_cast<const uint8_t*>(w.scales) + group;
  const __m128i codes = n >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)) : _mm_maskz_loadu_epi8(first_lanes(n), from);
  const __m512i wide = _mm512_cvtepu8_epi32(codes);
  if constexpr (format == Format::nvfp4) {
    const __m256i halves = _mm512_castsi512_si256(e4m3_halves(_mm512_castsi256_si512(_mm256_cvtepi8_epi16(codes))));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(wide, _mm512_set1_epi32(0x7f)), _mm512_set1_epi32(0x7f));
    return _mm512_mask_mov_ps(_mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(kE4m3Factor)), nan, _mm512_set1_ps(__builtin_nanf("")));
  }
  __m512i bits = _mm512_slli_epi32(wide, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(wide, wide), _mm512_set1_epi32(0x00400000));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(bits);
}

// Enough to hide the latency of an addition. Their number does not depend on that of the rows of x: a row's result is the same beside any others.
constexpr int64_t kIndependentSums = 4;

// Codes that fill words.
template <Format format, int bits>
struct WordLayout {
  using Words = CodeWords<bits>;

  explicit WordLayout(const Matrix& w)
      : words(w.cols / Words::codes), groups(w.cols / w.group_size), row_bytes(w.cols / 8 * bits), chunks_of_16_groups(w.group_size / Words::codes) {
    const int shift = __builtin_ctzll(chunks_of_16_groups);  // a group has as many words
    for (int word = 0; word < 16 * chunks_of_16_groups; ++word) group_of_word[word] = word >> shift;
  }

  int64_t words, groups, row_bytes;
  int64_t chunks_of_16_groups;  // a chunk is sixteen words
  alignas(64) int32_t group_of_word[16 * 32];
};

template <Format format, int bits, int rows>
inline void dot_chunk(const Numbers<format, bits>& numbers, __m512i words, __m512 scale, const float* spread, int64_t stride, __m512* total) {
  constexpr int kSums = smaller(kIndependentSums, CodeWords<bits>::codes / 2);
  __m512 sums[rows][kSums];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kSums; ++i) sums[r][i] = _mm512_setzero_ps();
  }
#pragma GCC unroll 16
  for (int i = 0; i < CodeWords<bits>::codes; ++i) {
    const __m512 values = numbers.of(words, i);
    for (int r = 0; r < rows; ++r) sums[r][i % kSums] = _mm512_fmadd_ps(values, _mm512_loadu_ps(spread + r * stride + i * 16), sums[r][i % kSums]);
  }
  for (int r = 0; r < rows; ++r) {
    __m512 sum = _mm512_add_ps(sums[r][0], sums[r][1]);
    if constexpr (kSums == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(sums[r][2], sums[r][3]));
    total[r] = _mm512_fmadd_ps(sum, scale, total[r]);
  }
}

// One row of w, sixteen groups at a time: each adds scale * (x . numbers) + bias * (sum of x).
template <Format format, int bits, int rows>
inline void dot_words(
    const Matrix& w,
    const WordLayout<format, bits>& layout,
    const Numbers<format, bits>& numbers,
    int64_t row,
    const uint8_t* codes,
    const float* spread,
    int64_t stride,
    const float* group_sums,
    __m512* total) {
  using Words = CodeWords<bits>;
  for (int64_t g = 0, words = layout.words; g < layout.groups; g += 16) {
    const int64_t first = row * layout.groups + g, groups = layout.groups - g;
    const __m512 scales = load_scales<format>(w, first, groups);
    if constexpr (format == Format::affine) {
      const __m512 biases = load_elements(w.element, w.biases, first, groups);
      for (int r = 0; r < rows; ++r) {
        total[r] = _mm512_fmadd_ps(biases, load_elements(Element::f32, group_sums + r * layout.groups, g, groups), total[r]);
      }
    }
    for (int64_t chunk = 0; chunk < layout.chunks_of_16_groups && words > 0; ++chunk, words -= 16) {
      const __m512 scale = _mm512_permutexvar_ps(_mm512_load_si512(layout.group_of_word + 16 * chunk), scales);
      dot_chunk<format, bits, rows>(numbers, load_code_words<bits>(codes), scale, spread, stride, total);
      codes += Words::bytes;
      spread += 16 * Words::codes;
    }
  }
}

// One row of e4m3 codes, in their order; a group is 32 of them. x is multiplied by kE4m3Factor.
template <int rows>
inline void dot_e4m3(const Matrix& w, int64_t groups, int64_t row, const float* x, int64_t ldx, __m512* total) {
  const auto* codes = reinterpret_cast<const __m256i*>(static_cast<const uint8_t*>(w.values) + row * w.cols);
  float scales[16];
  __m256i largest = _mm256_setzero_si256();  // code, without its sign
  for (int64_t g = 0; g < groups; ++g, ++codes, x += 32) {
    if (g % 16 == 0) _mm512_storeu_ps(scales, load_scales<Format::mxfp8>(w, row * groups + g, groups - g));
    const __m256i packed = _mm256_loadu_si256(codes);
    largest = _mm256_max_epu8(largest, _mm256_and_si256(packed, _mm256_set1_epi8(0x7f)));
    const __m512i halves = e4m3_halves(_mm512_cvtepi8_epi16(packed));
    const __m512 first = _mm512_cvtph_ps(_mm512_castsi512_si256(halves)), second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    for (int r = 0; r < rows; ++r) {
      const __m512 sum = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + r * ldx + 16), _mm512_mul_ps(first, _mm512_loadu_ps(x + r * ldx)));
      total[r] = _mm512_fmadd_ps(sum, _mm512_set1_ps(scales[g % 16]), total[r]);
    }
  }
  // One NaN makes all of the sum NaN.
  if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(0x7f)))) [[unlikely]] {
    for (int r = 0; r < rows; ++r) total[r] = _mm512_set1_ps(__builtin_nanf(""));
  }
}

template <Element element, int rows>
inline void dot_dense(const Matrix& w, int64_t row, const float* x, int64_t ldx, float* out) {
  const int64_t first = row * w.cols;
  __m512 sums[rows][kIndependentSums];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kIndependentSums; ++i) sums[r][i] = _mm512_setzero_ps();
  }
  int64_t k = 0;
  for (; k + 16 * kIndependentSums <= w.cols; k += 16 * kIndependentSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kIndependentSums; ++i) {
      const __m512 values = load_elements(element, w.values, first + k + 16 * i, 16);
      for (int r = 0; r < rows; ++r) sums[r][i] = _mm512_fmadd_ps(values, _mm512_loadu_ps(x + r * ldx + k + 16 * i), sums[r][i]);
    }
  }
  for (; k < w.cols; k += 16) {
    const __m512 values = load_elements(element, w.values, first + k, w.cols - k);
    for (int r = 0; r < rows; ++r) sums[r][0] = _mm512_fmadd_ps(values, load_elements(Element::f32, x + r * ldx, k, w.cols - k), sums[r][0]);
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 1; i < kIndependentSums; ++i) sums[r][0] = _mm512_add_ps(sums[r][0], sums[r][i]);
    out[r] = _mm512_reduce_add_ps(sums[r][0]);
  }
}

inline float sum_of_group(const float* x, int64_t size) {
  vec8 sum{};
  for (int64_t k = 0; k < size; k += 8) sum += load_vec8(x + k);
  return sum_of(sum);
}

template <Format format, int bits, int rows>
inline void matvec_codes(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldo) {
  constexpr int64_t chunk = 16 * CodeWords<bits>::codes;
  const int64_t stride = (w.cols + chunk - 1) / chunk * chunk, groups = w.cols / w.group_size;
  AlignedRows copies(rows, stride), group_sums(rows, format == Format::affine ? groups : 0), last_row(1, w.cols / 8 * bits / 4 + 16);
  for (int r = 0; r < rows; ++r) {
    for (int64_t g = 0; format == Format::affine && g < groups; ++g) {
      group_sums.data()[r * groups + g] = sum_of_group(x + r * ldx + g * w.group_size, w.group_size);
    }
    if constexpr (format == Format::mxfp8) {
      for (int64_t k = 0; k < w.cols; ++k) copies.data()[r * stride + k] = x[r * ldx + k] * kE4m3Factor;
    } else {
      spread_row<format, bits>(x + r * ldx, w.cols, copies.data() + r * stride);
    }
  }
  [[maybe_unused]] const WordLayout<format, bits> layout(w);
  [[maybe_unused]] const Numbers<format, bits> numbers;
  for (int64_t j = 0; j < count; ++j) {
    __m512 total[rows];
    for (int r = 0; r < rows; ++r) total[r] = _mm512_setzero_ps();
    if constexpr (format == Format::mxfp8) {
      dot_e4m3<rows>(w, groups, first + j, copies.data(), stride, total);
    } else {
      const uint8_t* codes = static_cast<const uint8_t*>(w.values) + (first + j) * layout.row_bytes;
      if ((w.rows - first - j - 1) * layout.row_bytes < 64) {
        __builtin_memcpy(last_row.data(), codes, layout.row_bytes);
        codes = reinterpret_cast<const uint8_t*>(last_row.data());
      }
      dot_words<format, bits, rows>(w, layout, numbers, first + j, codes, copies.data(), stride, group_sums.data(), total);
    }
    for (int r = 0; r < rows; ++r) out[r * ldo + j] = _mm512_reduce_add_ps(total[r]);
  }
}

}  // namespace metalens::cpu::METALENS_ISA
