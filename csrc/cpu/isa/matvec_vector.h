// Matrix-vector products with the rows of a frozen matrix on vectors of eight lanes, for instruction sets without AVX-512.
#pragma once

#include "cpu/isa/aligned_rows.h"
#include "cpu/isa/code_numbers.h"

namespace metalens::cpu::METALENS_ISA {

inline float power_of_two(int exponent) {
  Bits b;
  b.u = uint32_t(127 + exponent) << 23;
  return b.f;
}

// x in the order and with the factors of Codes<format, bits>.
template <Format format, int bits>
inline void arrange_row(const float* x, int64_t cols, float* arranged) {
  constexpr CodeOrder order = Codes<format, bits>::order;
  float factors[16];
  for (int i = 0; i < 16; ++i) factors[i] = power_of_two(-order.exponent[i]);
  for (int64_t k = 0; k < cols; k += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) arranged[k + i] = x[k + order.column[i]] * factors[i];
  }
}

// The sums of x over each group, in eight parts.
inline void sum_groups(const float* x, int64_t cols, int64_t group_size, float* sums) {
  for (int64_t start = 0; start < cols; start += group_size, sums += 8) {
    vec8 sum{};
    for (int64_t k = start; k < start + group_size; k += 8) sum += load_vec8(x + k);
    store_vec8(sums, sum);
  }
}

// One row of w: a group of columns adds scale * (x . numbers) + bias * (sum of x).
template <Format format, int bits, int rows>
inline void dot_codes(
    const uint8_t* codes,
    int64_t groups,
    int64_t group_size,
    const float* x,
    int64_t stride,
    const float* scales,
    const float* biases,
    const float* sums,
    float* out) {
  constexpr int together = format == Format::nvfp4 ? 1 : 2;  // sixteens; a group of the formats without a bias is so long
  vec8 total[rows];
  for (int r = 0; r < rows; ++r) total[r] = vec8{};
  for (int64_t g = 0; g < groups; ++g, sums += 8) {
    vec8 even[rows], odd[rows];
    for (int r = 0; r < rows; ++r) even[r] = odd[r] = vec8{};
    const float* const end = x + group_size;
    do {
#pragma GCC unroll 2
      for (int i = 0; i < together; ++i, x += 16, codes += 2 * bits) {
        const Sixteen numbers = Codes<format, bits>::unpack(codes);
        for (int r = 0; r < rows; ++r) {
          even[r] += numbers.first * load_vec8(x + r * stride);
          odd[r] += numbers.second * load_vec8(x + r * stride + 8);
        }
      }
    } while (format == Format::affine && x != end);
    for (int r = 0; r < rows; ++r) {
      total[r] += (even[r] + odd[r]) * scales[g];
      if constexpr (format == Format::affine) total[r] += biases[g] * load_vec8(sums + r * groups * 8);
    }
  }
  for (int r = 0; r < rows; ++r) out[r] = sum_of(total[r]);
}

template <Format format>
inline void load_groups(const Matrix& w, int64_t first, int64_t count, float* scales, float* biases) {
  if constexpr (format == Format::affine) {
    load(w.element, offset(w.scales, first * element_size(w.element)), scales, count);
    load(w.element, offset(w.biases, first * element_size(w.element)), biases, count);
  } else {
    int64_t i = 0;
    if constexpr (format == Format::nvfp4) {  // scales are e4m3 codes, one for sixteen weights: as costly as those if looked up one by one
      using Scale = Codes<Format::mxfp8, 8>;
      const float factor = power_of_two(-Scale::order.exponent[0]);
      for (; i + 16 <= count; i += 16) {
        const Sixteen numbers = Scale::unpack(static_cast<const uint8_t*>(w.scales) + first + i);
        store_vec8(scales + i, numbers.first * factor);
        store_vec8(scales + i + 8, numbers.second * factor);
      }
    }
    for (; i < count; ++i) scales[i] = group_at<format>(w, first + i).scale;
  }
}

template <Format format, int bits, int rows>
inline void matvec_codes(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldo) {
  constexpr int64_t kTogether = 8;  // rows of w whose scales are widened together
  const int64_t groups = w.cols / w.group_size, row_bytes = w.cols / 8 * bits;
  AlignedRows memory(1, rows * (w.cols + groups * 8) + 2 * kTogether * groups);
  float *const arranged = memory.data(), *const sums = arranged + rows * w.cols, *const scales = sums + rows * groups * 8;
  float* const biases = scales + kTogether * groups;
  for (int r = 0; r < rows; ++r) {
    arrange_row<format, bits>(x + r * ldx, w.cols, arranged + r * w.cols);
    if constexpr (format == Format::affine) sum_groups(x + r * ldx, w.cols, w.group_size, sums + r * groups * 8);
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t row = first + j, with = j % kTogether;
    if (with == 0) load_groups<format>(w, row * groups, smaller(kTogether, count - j) * groups, scales, biases);
    const uint8_t* codes = static_cast<const uint8_t*>(w.values) + row * row_bytes;
    float dots[rows];
    dot_codes<format, bits, rows>(codes, groups, w.group_size, arranged, w.cols, scales + with * groups, biases + with * groups, sums, dots);
    for (int r = 0; r < rows; ++r) out[r * ldo + j] = dots[r];
  }
}

// Eight elements, widened.
template <Element element>
inline vec8 load_elements8(const void* values, int64_t at) {
  if constexpr (element == Element::f32) return load_vec8(static_cast<const float*>(values) + at);
#ifdef __AVX2__
  if constexpr (element == Element::bf16) {
    const auto* from = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + at);
    return vec8(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16));
  }
#endif
  float wide[8];
  load(element, static_cast<const uint16_t*>(values) + at, wide, 8);
  return load_vec8(wide);
}

template <Element element, int rows>
inline void dot_dense(const Matrix& w, int64_t row, const float* x, int64_t ldx, float* out) {
  constexpr int kSums = 2;  // whatever the number of rows: a row's result is the same beside any others
  const int64_t first = row * w.cols;
  vec8 sums[rows][kSums];
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kSums; ++i) sums[r][i] = vec8{};
  }
  int64_t k = 0;
  for (; k + 8 * kSums <= w.cols; k += 8 * kSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const vec8 values = load_elements8<element>(w.values, first + k + 8 * i);
      for (int r = 0; r < rows; ++r) sums[r][i] += values * load_vec8(x + r * ldx + k + 8 * i);
    }
  }
  for (; k + 8 <= w.cols; k += 8) {
    const vec8 values = load_elements8<element>(w.values, first + k);
    for (int r = 0; r < rows; ++r) sums[r][0] += values * load_vec8(x + r * ldx + k);
  }
  for (int r = 0; r < rows; ++r) {
    for (int i = 1; i < kSums; ++i) sums[r][0] += sums[r][i];
    out[r] = sum_of(sums[r][0]);
  }
  for (; k < w.cols; ++k) {
    for (int r = 0; r < rows; ++r) out[r] += x[r * ldx + k] * widen(element, w.values, first + k);
  }
}

}  // namespace metalens::cpu::METALENS_ISA
