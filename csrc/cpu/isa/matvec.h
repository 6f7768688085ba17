// Matrix-vector products: up to kMatvecRows rows with a frozen matrix. Unpacking the weights bounds their speed, so each weight is used in registers
// as soon as it is unpacked.
#pragma once

#include "cpu/isa/panels.h"
#ifdef __AVX512F__
#include "cpu/isa/matvec_avx512.h"
#else
#include "cpu/isa/matvec_vector.h"
#endif

namespace metalens::cpu::METALENS_ISA {

template <Element element, int rows>
inline void matvec_dense(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldo) {
  for (int64_t j = 0; j < count; ++j) {
    float dots[rows];
    dot_dense<element, rows>(w, first + j, x, ldx, dots);
    for (int r = 0; r < rows; ++r) out[r * ldo + j] = dots[r];
  }
}

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
    return with_rows(rows, [&]<int r>() {
      const auto product = w.element == Element::f32   ? matvec_dense<Element::f32, r>
                           : w.element == Element::f16 ? matvec_dense<Element::f16, r>
                                                       : matvec_dense<Element::bf16, r>;
      product(w, first, count, x, ldx, out, ldo);
    });
  }
  with_format(
      w, [&]<Format format, int bits>() { with_rows(rows, [&]<int r>() { matvec_codes<format, bits, r>(w, first, count, x, ldx, out, ldo); }); });
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
