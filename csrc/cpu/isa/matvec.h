// Matrix-vector products: up to kMatvecRows rows with a frozen matrix. Unpacking the weights bounds their speed, so each weight is used in registers
// as soon as it is unpacked.
#pragma once

#include "cpu/isa/panels.h"
#ifdef __AVX512F__
#include "cpu/isa/matvec_avx512.h"
#endif

namespace metalens::cpu::METALENS_ISA {

#ifndef __AVX512F__
// out[r] = sum over k of x[r, k] w[row, k]. A group of columns adds scale * (x . codes) + bias * (sum of x); `group_sums` holds the sums of x.
template <Format format, int bits, int rows>
inline void dot_row(const Matrix& w, int64_t row, const float* x, int64_t ldx, const float* group_sums, float* out) {
  const int64_t groups = w.cols / w.group_size;
  const uint8_t* codes = static_cast<const uint8_t*>(w.values) + row * w.cols / 8 * bits;
  vec8 total[rows];
  float biased[rows];
  for (int r = 0; r < rows; ++r) {
    total[r] = vec8{};
    biased[r] = 0;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const Group group = group_at<format>(w, row * groups + g);
    vec8 even[rows], odd[rows];
    for (int r = 0; r < rows; ++r) even[r] = odd[r] = vec8{};
    const int64_t end = (g + 1) * w.group_size;
    for (int64_t k = g * w.group_size; k < end; k += 16, codes += 2 * bits) {
      const vec8 c0 = codes8<format, bits>(codes);
      const vec8 c1 = codes8<format, bits>(codes + bits);
      for (int r = 0; r < rows; ++r) {
        even[r] += c0 * load_vec8(x + r * ldx + k);
        odd[r] += c1 * load_vec8(x + r * ldx + k + 8);
      }
    }
    for (int r = 0; r < rows; ++r) {
      total[r] += (even[r] + odd[r]) * group.scale;
      if constexpr (format == Format::affine) biased[r] += group.bias * group_sums[r * groups + g];
    }
  }
  for (int r = 0; r < rows; ++r) out[r] = sum_of(total[r]) + biased[r];
}

#endif

template <Format format, int bits, int rows>
inline void matvec_quantized_rows(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldo) {
  const int64_t groups = w.cols / w.group_size;
  // On the heap only for widths that no model has today; blocks of columns would cost every row of w a second pass. `new` instead of a vector: a unit
  // includes nothing of the standard library (see cpu/kernels.h).
  float local[kMatvecRows * 1024];
  float* sums = rows * groups <= int64_t(sizeof(local) / sizeof(float)) ? local : new float[rows * groups];
  for (int r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      vec8 sum{};
      for (int64_t k = 0; k < w.group_size; k += 8) sum += load_vec8(x + r * ldx + g * w.group_size + k);
      sums[r * groups + g] = sum_of(sum);
    }
  }
#ifdef __AVX512F__
  matvec_codes<format, bits, rows>(w, first, count, x, ldx, sums, out, ldo);
#else
  for (int64_t j = 0; j < count; ++j) {
    float dots[rows];
    dot_row<format, bits, rows>(w, first + j, x, ldx, sums, dots);
    for (int r = 0; r < rows; ++r) out[r * ldo + j] = dots[r];
  }
#endif
  if (sums != local) delete[] sums;
}

#ifndef __AVX512F__
inline void matvec_dense_rows(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo) {
  float values[kReductionBlock];
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t start = 0; start < w.cols; start += kReductionBlock) {
      const int64_t depth = smaller(kReductionBlock, w.cols - start);
      unpack(w, first + j, start, depth, values);
      for (int64_t r = 0; r < rows; ++r) {
        const float* a = x + r * ldx + start;
        vec sum{};
        int64_t k = 0;
        for (; k + kVector <= depth; k += kVector) sum += load_vec(a + k) * load_vec(values + k);
        float total = sum_of(sum);
        for (; k < depth; ++k) total += a[k] * values[k];
        out[r * ldo + j] = start ? out[r * ldo + j] + total : total;
      }
    }
  }
}

#endif

// Call f with the number of rows as its template argument.
template <typename F>
inline void with_rows(int64_t rows, F f) {
  switch (rows) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      return f.template operator()<4>();
  }
}

void matvec_rows(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo) {
  if (w.format == Format::dense) {
#ifdef __AVX512F__
    return with_rows(rows, [&]<int r>() { matvec_dense<r>(w, first, count, x, ldx, out, ldo); });
#else
    return matvec_dense_rows(w, first, count, x, ldx, rows, out, ldo);
#endif
  }
  with_format(w, [&]<Format format, int bits>() {
    with_rows(rows, [&]<int r>() { matvec_quantized_rows<format, bits, r>(w, first, count, x, ldx, out, ldo); });
  });
}

// Takes four rows of w at a time, so that each sum is loaded and stored once for four products.
void matvec_columns(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo) {
  constexpr int64_t kTogether = 4;
  float values[kTogether][kReductionBlock];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < w.cols; ++j) out[r * ldo + j] = 0;
  }
  for (int64_t v = 0; v < count; v += kTogether) {
    const int64_t together = smaller(kTogether, count - v);
    for (int64_t start = 0; start < w.cols; start += kReductionBlock) {
      const int64_t strip = smaller(kReductionBlock, w.cols - start);
      for (int64_t i = 0; i < together; ++i) unpack(w, first + v + i, start, strip, values[i]);
      for (int64_t i = together; i < kTogether; ++i) __builtin_memset(values[i], 0, sizeof(values[i]));
      for (int64_t r = 0; r < rows; ++r) {
        float a[kTogether] = {};
        for (int64_t i = 0; i < together; ++i) a[i] = x[r * ldx + v + i];
        float* sum = out + r * ldo + start;
        int64_t j = 0;
        for (; j + kVector <= strip; j += kVector) {
          const vec odd = a[1] * load_vec(values[1] + j) + a[3] * load_vec(values[3] + j);
          store_vec(sum + j, load_vec(sum + j) + (a[0] * load_vec(values[0] + j) + a[2] * load_vec(values[2] + j)) + odd);
        }
        for (; j < strip; ++j) sum[j] += (a[0] * values[0][j] + a[2] * values[2][j]) + (a[1] * values[1][j] + a[3] * values[3][j]);
      }
    }
  }
}

}  // namespace metalens::cpu::METALENS_ISA
