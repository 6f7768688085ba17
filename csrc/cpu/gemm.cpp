#include "cpu/gemm.h"

#include <algorithm>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/buffer.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

// a W^T: a task is a strip of output columns and all of the reduction.
void matvec_rows(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, float* c) {
  const int64_t strip = std::clamp<int64_t>(n / (4 * num_threads()) / 64 * 64, 64, 1024);
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

}  // namespace

// Packs B [k, n], which is W^T or W, panel by panel. A task is one panel of output columns and all of the reduction. It takes all rows or, if there
// are too few panels to keep the threads busy, one group of rows.
void gemm(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, float* c) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    std::fill(c, c + m * n, 0.0f);
    return;
  }
  if (m <= kMatvecRows) return transpose ? matvec_rows(a, m, n, k, w, c) : matvec_columns(a, m, n, k, w, c);
  const auto& tiles = multiplier(precision);
  const int64_t width = tiles.panel_width;
  const int64_t panels = (n + width - 1) / width;
  const int64_t wanted = std::clamp<int64_t>(4 * num_threads() / panels, 1, (m + 63) / 64);
  const int64_t rows_per_group = (m + wanted - 1) / wanted;
  const int64_t groups = (m + rows_per_group - 1) / rows_per_group;
  std::vector<Left> lefts;
  for (int64_t group = 0; group < groups; ++group) lefts.emplace_back(tiles, std::min(rows_per_group, m - group * rows_per_group), k);
  parallel_for(groups, [&](int64_t group) { lefts[group].pack(a + group * rows_per_group * k, k); });
  parallel_for(panels * groups, [&](int64_t task) {
    const Buffer<std::byte> panel(tiles.panel_bytes);
    const int64_t column = task / groups * width;
    const int64_t columns = std::min(width, n - column);
    const int64_t group = task % groups;
    const Product product{lefts[group], c + group * rows_per_group * n + column, n, false};
    multiply_panel(tiles, {&product, 1}, w, transpose, column, columns, 0, panel.data());
  });
}

}  // namespace metalens::cpu
