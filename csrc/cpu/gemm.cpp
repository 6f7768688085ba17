#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/buffer.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

// a W^T: a task is a strip of output columns and all of the reduction.
void matvec_rows(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, float* c) {
  const int64_t strip = std::clamp<int64_t>(n / (4 * num_threads()) / 64 * 64, 64, 2048);
  parallel_for((n + strip - 1) / strip, [&](int64_t task) {
    const int64_t first = task * strip;
    kernels().matvec_rows(w, first, std::min(strip, n - first), a, k, m, c + first, n);
  });
}

// a W: a task is a part of the reduction, so that W is read row by row, as it lies in memory. The parts do not depend on the number of threads.
void matvec_columns(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, float* c) {
  constexpr int64_t kParts = 16, kSmallestPart = 128;
  const int64_t part = std::max(kSmallestPart, (k + kParts - 1) / kParts);
  const int64_t parts = (k + part - 1) / part;
  const Buffer<float> sums(parts * m * n);
  parallel_for(parts, [&](int64_t i) {
    const int64_t first = i * part;
    kernels().matvec_columns(w, first, std::min(part, k - first), a + first, k, m, sums.data() + i * m * n, n);
  });
  std::copy_n(sums.data(), m * n, c);
  for (int64_t i = 1; i < parts; ++i) {
    for (int64_t j = 0; j < m * n; ++j) c[j] += sums.data()[i * m * n + j];
  }
}

void few_rows(const Rows& a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, const Result& c) {
  const bool wide_a = a.element == Element::f32, wide_c = c.element == Element::f32;
  const Buffer<float> rows(wide_a ? 0 : m * k), result(wide_c ? 0 : m * n);
  if (!wide_a) kernels().load(a.element, a.data, rows.data(), m * k);
  const float* x = wide_a ? static_cast<const float*>(a.data) : rows.data();
  float* y = wide_c ? static_cast<float*>(c.data) : result.data();
  transpose ? matvec_rows(x, m, n, k, w, y) : matvec_columns(x, m, n, k, w, y);
  if (!wide_c) kernels().store(c.element, y, c.data, m * n);
}

// Rows of a group, at most: their packed blocks stay in the L2 cache while all panels pass by.
constexpr int64_t kGroupRows = 256;

// A task is a group of rows, one panel of output columns, and all of the reduction. It packs the panel itself: to share panels between groups would
// cost another round of the threads, and packing is a few percent of the product of a whole group.
void many_rows(const Rows& a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, const Result& c) {
  const auto& tiles = multiplier(a.element == Element::bf16 && w.format == Format::dense && w.element == Element::bf16 ? Precision::bf16 : precision);
  const int64_t width = tiles.panel_width, panels = (n + width - 1) / width, threads = num_threads();
  // Where there are too few panels to keep the threads busy, smaller groups.
  const int64_t wanted = std::max((m + kGroupRows - 1) / kGroupRows, std::min(4 * threads / panels, (m + 63) / 64));
  const int64_t rows_per_group = (m + wanted - 1) / wanted;
  const int64_t groups = (m + rows_per_group - 1) / rows_per_group;

  std::vector<Left> lefts;
  for (int64_t group = 0; group < groups; ++group) lefts.emplace_back(tiles, std::min(rows_per_group, m - group * rows_per_group), k);
  parallel_for(groups, [&](int64_t group) {
    const auto* rows = static_cast<const std::byte*>(a.data) + group * rows_per_group * k * element_size(a.element);
    if (a.element == Element::f32) return lefts[group].pack(reinterpret_cast<const float*>(rows), k);
    const int64_t size = lefts[group].rows() * k;
    const Buffer<float> wide(size);
    kernels().load(a.element, rows, wide.data(), size);
    lefts[group].pack(wide.data(), k);
  });
  parallel_for(panels * groups, [&](int64_t task) {
    const int64_t column = task % panels * width, columns = std::min(width, n - column), group = task / panels;
    const Left& left = lefts[group];
    const int64_t at = group * rows_per_group * n + column;  // of the task's first result
    const bool narrow = c.element != Element::f32;
    const Buffer<float> sums(narrow ? left.rows() * width : 0);
    const Buffer<std::byte> panel(tiles.panel_bytes);
    const Product product{left, narrow ? sums.data() : static_cast<float*>(c.data) + at, narrow ? width : n, false};
    multiply_panel(tiles, {&product, 1}, w, transpose, column, columns, 0, panel.data());
    for (int64_t row = 0; narrow && row < left.rows(); ++row) {
      kernels().store(c.element, sums.data() + row * width, static_cast<std::byte*>(c.data) + (at + row * n) * element_size(c.element), columns);
    }
  });
}

}  // namespace

void gemm(const Rows& a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, const Result& c) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    std::memset(c.data, 0, m * n * element_size(c.element));
  } else if (m <= kMatvecRows) {
    few_rows(a, m, n, k, w, transpose, c);
  } else {
    many_rows(a, m, n, k, w, transpose, precision, c);
  }
}

void gemm(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, float* c) {
  gemm({a, Element::f32}, m, n, k, w, transpose, precision, {c, Element::f32});
}

}  // namespace metalens::cpu
