// Matrix-vector products with the rows of a frozen matrix on AVX-512. They take three (codes of 2 or 4 bits) to eight instructions for sixteen
// weights, so that multiplying a matrix takes about as long as reading it.
#pragma once

#include "cpu/isa/aligned_rows.h"
#include "cpu/isa/elements.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace metalens::cpu::METALENS_ISA {

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}

// Up to sixteen elements, widened; the other lanes are zero and are not read.
inline __m512 load_elements(Element e, const void* values, int64_t at, int64_t n) {
  const __mmask16 lanes = first_lanes(n);
  if (e == Element::f32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(values) + at);
  const __m256i halves = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(values) + at);
  if (e == Element::f16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Sixteen e4m3 codes, sign-extended to 16 bits. As float16 their bits mean 2^-8 of the value, also for subnormal numbers.
inline __m512 e4m3_values(__m256i codes) {
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(short(0xbfff)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(half, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x3f80));
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))), _mm512_set1_ps(256.0f));
}

// The scales of up to sixteen groups; the other lanes are finite and are not read.
template <Format format>
inline __m512 load_scales(const Matrix& w, int64_t group, int64_t n) {
  if constexpr (format == Format::affine) return load_elements(w.element, w.scales, group, n);
  const __m128i codes = _mm_maskz_loadu_epi8(first_lanes(n), static_cast<const uint8_t*>(w.scales) + group);
  if constexpr (format == Format::nvfp4) return e4m3_values(_mm256_cvtepi8_epi16(codes));
  const __m512i wide = _mm512_cvtepu8_epi32(codes);
  __m512i bits = _mm512_slli_epi32(wide, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(wide, wide), _mm512_set1_epi32(0x00400000));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(bits);
}

// The numbers that the codes of up to 4 bits stand for. A lookup reads four bits of its index, so for codes of 2 bits the table repeats.
template <Format format, int bits>
inline __m512 number_table() {
  if constexpr (format != Format::affine) return _mm512_loadu_ps(kTables.e2m1);
  float numbers[16];
  for (int i = 0; i < 16; ++i) numbers[i] = float(i & ((1 << bits) - 1));
  return _mm512_loadu_ps(numbers);
}

// Codes of 2 or 4 bits. Sixteen words are unpacked at a time: shifted alike, each gives one code to its lane. So x is rearranged to `spread`: for
// every sixteen words [codes in a word][16 words], zeros beyond the last.
template <int bits>
constexpr int64_t kCodesInWord = 32 / bits;

template <int bits>
inline int64_t chunks_of(int64_t cols) {
  return (cols + 16 * kCodesInWord<bits> - 1) / (16 * kCodesInWord<bits>);
}

template <int bits>
inline void spread_row(const float* x, int64_t cols, float* spread) {
  constexpr int64_t codes = kCodesInWord<bits>;
  for (int64_t chunk = 0; chunk < chunks_of<bits>(cols); ++chunk, x += 16 * codes, spread += 16 * codes) {
    const int64_t words = smaller(16, (cols - chunk * 16 * codes) / codes);
    for (int64_t i = 0; i < codes; ++i) {
      for (int64_t word = 0; word < 16; ++word) spread[i * 16 + word] = word < words ? x[word * codes + i] : 0;
    }
  }
}

// What does not change from row to row; a division takes as long as a dozen weights.
template <Format format, int bits>
struct WordLayout {
  explicit WordLayout(const Matrix& w) : table(number_table<format, bits>()) {
    const int64_t in_group = w.group_size / kCodesInWord<bits>;  // words; a power of two
    words = w.cols / kCodesInWord<bits>;
    groups = w.cols / w.group_size;
    shift = __builtin_ctzll(in_group);
    int lanes[16];
    for (int lane = 0; lane < 16; ++lane) lanes[lane] = lane >> shift;
    group_of_lane = _mm512_loadu_si512(lanes);
  }

  __m512 table;
  __m512i group_of_lane;
  int64_t words, groups;
  int shift;
};

template <Format format, int bits, int rows>
inline void dot_chunk(
    const Matrix& w,
    const WordLayout<format, bits>& layout,
    __m512i packed,
    int64_t group,
    int64_t groups_here,
    const float* spread,
    int64_t stride,
    __m512* total) {
  const __m512 scale = _mm512_permutexvar_ps(layout.group_of_lane, load_scales<format>(w, group, groups_here));
  __m512 even[rows], odd[rows];
  for (int r = 0; r < rows; ++r) even[r] = odd[r] = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < kCodesInWord<bits>; i += 2) {
    const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, unsigned(i * bits)), layout.table);
    const __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, unsigned(i * bits + bits)), layout.table);
    for (int r = 0; r < rows; ++r) {
      even[r] = _mm512_fmadd_ps(first, _mm512_loadu_ps(spread + r * stride + i * 16), even[r]);
      odd[r] = _mm512_fmadd_ps(second, _mm512_loadu_ps(spread + r * stride + i * 16 + 16), odd[r]);
    }
  }
  for (int r = 0; r < rows; ++r) total[r] = _mm512_fmadd_ps(_mm512_add_ps(even[r], odd[r]), scale, total[r]);
}

template <Format format, int bits, int rows>
inline void dot_words(const Matrix& w, const WordLayout<format, bits>& layout, int64_t row, const float* spread, int64_t stride, __m512* total) {
  const uint32_t* from = static_cast<const uint32_t*>(w.values) + row * layout.words;
  const int64_t first_group = row * layout.groups;
  const int64_t groups_in_chunk = 16 >> layout.shift;
  int64_t word = 0;
  for (; word + 16 <= layout.words; word += 16, spread += 16 * kCodesInWord<bits>) {
    const __m512i packed = _mm512_loadu_si512(from + word);
    dot_chunk<format, bits, rows>(w, layout, packed, first_group + (word >> layout.shift), groups_in_chunk, spread, stride, total);
  }
  if (word < layout.words) {
    const __m512i packed = _mm512_maskz_loadu_epi32(first_lanes(layout.words - word), from + word);
    const int64_t group = word >> layout.shift;
    dot_chunk<format, bits, rows>(w, layout, packed, first_group + group, layout.groups - group, spread, stride, total);
  }
}

// Where sixteen codes that lie side by side begin: the byte of each, and the bits before it in that byte. A code of up to 8 bits lies within two
// bytes.
template <int bits>
struct CodePlaces {
  constexpr CodePlaces() : bytes(), shifts() {
    for (int i = 0; i < 16; ++i) {
      bytes[2 * i] = uint8_t(i * bits / 8);
      bytes[2 * i + 1] = uint8_t(i * bits / 8 + 1);
      shifts[i] = uint16_t(i * bits % 8);
    }
  }
  uint8_t bytes[32];
  uint16_t shifts[16];
};

template <int bits>
constexpr CodePlaces<bits> kCodePlaces;

// The numbers of sixteen codes of one row, in their order.
template <Format format, int bits>
inline __m512 sixteen_numbers(const uint8_t* codes) {
  if constexpr (bits == 8) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    if constexpr (format == Format::mxfp8) return e4m3_values(_mm256_cvtepi8_epi16(bytes));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  }
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_maskz_loadu_epi8(first_lanes(2 * bits), codes));
  const __m256i pairs = _mm256_shuffle_epi8(bytes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kCodePlaces<bits>.bytes)));
  const __m256i shifted = _mm256_srlv_epi16(pairs, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kCodePlaces<bits>.shifts)));
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_and_si256(shifted, _mm256_set1_epi16((1 << bits) - 1))));
}

// Codes of other widths, in their order. A group is a multiple of 32 codes.
template <Format format, int bits, int rows>
inline void dot_in_order(const Matrix& w, int64_t groups, int64_t row, const float* x, int64_t ldx, __m512* total) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.values) + row * w.cols / 8 * bits;
  float scales[16];
  for (int64_t g = 0; g < groups; ++g) {
    if (g % 16 == 0) _mm512_storeu_ps(scales, load_scales<format>(w, row * groups + g, groups - g));
    __m512 even[rows], odd[rows];
    for (int r = 0; r < rows; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.group_size; k += 32, codes += 4 * bits, x += 32) {
      const __m512 first = sixteen_numbers<format, bits>(codes), second = sixteen_numbers<format, bits>(codes + 2 * bits);
      for (int r = 0; r < rows; ++r) {
        even[r] = _mm512_fmadd_ps(first, _mm512_loadu_ps(x + r * ldx), even[r]);
        odd[r] = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + r * ldx + 16), odd[r]);
      }
    }
    for (int r = 0; r < rows; ++r) total[r] = _mm512_fmadd_ps(_mm512_add_ps(even[r], odd[r]), _mm512_set1_ps(scales[g % 16]), total[r]);
  }
}

template <Element element, int rows>
inline void dot_dense(const Matrix& w, int64_t row, const float* x, int64_t ldx, float* out) {
  constexpr int kSums = rows > 2 ? 2 : 4;  // enough independent sums to hide the latency of an addition
  const int64_t first = row * w.cols;
  __m512 sums[rows][kSums];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kSums; ++i) sums[r][i] = _mm512_setzero_ps();
  }
  int64_t k = 0;
  for (; k + 16 * kSums <= w.cols; k += 16 * kSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const __m512 values = load_elements(element, w.values, first + k + 16 * i, 16);
      for (int r = 0; r < rows; ++r) sums[r][i] = _mm512_fmadd_ps(values, _mm512_loadu_ps(x + r * ldx + k + 16 * i), sums[r][i]);
    }
  }
  for (; k < w.cols; k += 16) {
    const __m512 values = load_elements(element, w.values, first + k, w.cols - k);
    for (int r = 0; r < rows; ++r) sums[r][0] = _mm512_fmadd_ps(values, load_elements(Element::f32, x + r * ldx, k, w.cols - k), sums[r][0]);
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 1; i < kSums; ++i) sums[r][0] = _mm512_add_ps(sums[r][0], sums[r][i]);
    out[r] = _mm512_reduce_add_ps(sums[r][0]);
  }
}

inline float sum_of_group(const float* x, int64_t size) {
  vec8 sum{};
  for (int64_t k = 0; k < size; k += 8) sum += load_vec8(x + k);
  return sum_of(sum);
}

// The sum over the groups of their bias and the sum of x in them.
template <int rows>
inline void dot_biases(const Matrix& w, int64_t groups, int64_t row, const float* group_sums, __m512* total) {
  for (int64_t g = 0; g < groups; g += 16) {
    const __m512 biases = load_elements(w.element, w.biases, row * groups + g, groups - g);
    for (int r = 0; r < rows; ++r) {
      total[r] = _mm512_fmadd_ps(biases, load_elements(Element::f32, group_sums + r * groups, g, groups - g), total[r]);
    }
  }
}

template <Format format, int bits, int rows>
inline void matvec_codes(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldo) {
  constexpr bool in_words = bits == 2 || bits == 4;
  constexpr int64_t chunk = in_words ? 16 * kCodesInWord<bits> : 16;
  const int64_t stride = (w.cols + chunk - 1) / chunk * chunk, groups = w.cols / w.group_size;
  AlignedRows copies(rows, stride), group_sums(rows, format == Format::affine ? groups : 0);
  for (int r = 0; r < rows; ++r) {
    for (int64_t g = 0; format == Format::affine && g < groups; ++g) {
      group_sums.data()[r * groups + g] = sum_of_group(x + r * ldx + g * w.group_size, w.group_size);
    }
    if constexpr (in_words) {
      spread_row<bits>(x + r * ldx, w.cols, copies.data() + r * stride);
    } else {
      __builtin_memcpy(copies.data() + r * stride, x + r * ldx, w.cols * sizeof(float));
    }
  }
  [[maybe_unused]] const WordLayout<format, in_words ? bits : 4> layout(w);
  for (int64_t j = 0; j < count; ++j) {
    __m512 total[rows];
    for (int r = 0; r < rows; ++r) total[r] = _mm512_setzero_ps();
    if constexpr (in_words) {
      dot_words<format, bits, rows>(w, layout, first + j, copies.data(), stride, total);
    } else {
      dot_in_order<format, bits, rows>(w, groups, first + j, copies.data(), stride, total);
    }
    if constexpr (format == Format::affine) dot_biases<rows>(w, groups, first + j, group_sums.data(), total);
    for (int r = 0; r < rows; ++r) out[r * ldo + j] = _mm512_reduce_add_ps(total[r]);
  }
}

}  // namespace metalens::cpu::METALENS_ISA
