#include "cpu/translate_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/gemm.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

// Call f(row) for all rows, in runs long enough to occupy a thread.
template <typename F>
void for_rows(int64_t rows, int64_t d, const F& f) {
  const int64_t run = std::max<int64_t>(1, 65536 / std::max<int64_t>(d, 1));
  parallel_for((rows + run - 1) / run, [&](int64_t i) {
    for (int64_t r = i * run; r < std::min(rows, (i + 1) * run); ++r) f(r);
  });
}

}  // namespace

void translate_norm(
    const float* h, int64_t rows, int64_t d, const Matrix* w, const float* b, const Norm& norm, Precision precision, float* y, float* n) {
  if (w) {
    gemm(h, rows, d, d, *w, true, precision, y);
  } else {
    std::copy_n(h, rows * d, y);
  }
  for_rows(rows, d, [&](int64_t r) {
    if (b) kernels().transform(y + r * d, b, d, 1, 0);
    if (norm.enabled) {
      kernels().normalize(y + r * d, norm.gain, norm.bias, d, norm.eps, norm.center, n + r * d);
    } else {
      std::copy_n(y + r * d, d, n + r * d);
    }
  });
}

void norm_backward(const float* y, const float* dn, int64_t rows, int64_t d, const Norm& norm, float* dy) {
  for_rows(rows, d, [&](int64_t r) {
    if (!norm.enabled) {
      std::copy_n(dn + r * d, d, dy + r * d);
      return;
    }
    const RowMoments moments = kernels().normalize(y + r * d, nullptr, nullptr, d, norm.eps, norm.center, dy + r * d);
    kernels().normalize_backward(y + r * d, norm.gain, dn + r * d, d, moments, norm.center, dy + r * d);
  });
}

void translator_gradient(
    const float* h, const float* y, const float* dn, int64_t rows, int64_t d, const Norm& norm, Precision precision, float* dw, float* db) {
  const Buffer<float> dy(rows * d), turned(rows * d);
  norm_backward(y, dn, rows, d, norm, dy.data());
  // dw = dy^T h, whose left side must lie row by row.
  constexpr int64_t kSquare = 32;
  parallel_for((d + kSquare - 1) / kSquare, [&](int64_t i) {
    const int64_t first = i * kSquare, last = std::min(d, first + kSquare);
    std::fill(db + first, db + last, 0.0f);
    for (int64_t start = 0; start < rows; start += kSquare) {
      const int64_t end = std::min(rows, start + kSquare);
      for (int64_t r = start; r < end; ++r) {
        for (int64_t j = first; j < last; ++j) db[j] += dy.data()[r * d + j];
      }
      kernels().transpose_block(dy.data() + start * d + first, d, end - start, last - first, turned.data() + first * rows + start, rows);
    }
  });
  const Matrix w{rows, d, Element::f32, Format::dense, 0, 0, h, nullptr, nullptr};
  gemm(turned.data(), d, d, rows, w, false, precision, dw);
}

}  // namespace metalens::cpu
