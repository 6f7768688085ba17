#include "cpu/gemm.h"

#include <algorithm>
#include <vector>

#include "cpu/thread_pool.h"

namespace metalens::cpu {

// B [k, n], which is W^T or W, is packed panel by panel. A task is one panel of output columns, all of the reduction, and all rows or, where there
// are too few panels to keep the threads busy, a share of them.
void gemm(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, float* c) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    std::fill(c, c + m * n, 0.0f);
    return;
  }
  const auto& table = kernels();
  const int64_t width = table.panel_width;
  const int64_t panels = (n + width - 1) / width;
  const int64_t wanted = 4 * num_threads();
  const int64_t shares = std::clamp<int64_t>(wanted / panels, 1, (m + 63) / 64);
  const int64_t rows_per_share = (m + shares - 1) / shares;
  const auto pack = transpose ? table.pack_rows : table.pack_columns;
  parallel_for(panels * shares, [&](int64_t task) {
    thread_local std::vector<float> panel;
    panel.resize(kReductionBlock * width);
    const int64_t column = task / shares * width;
    const int64_t columns = std::min(width, n - column);
    const int64_t row = task % shares * rows_per_share;
    const int64_t rows = std::min(rows_per_share, m - row);
    for (int64_t start = 0; start < k && rows > 0; start += kReductionBlock) {
      const int64_t depth = std::min(kReductionBlock, k - start);
      pack(w, column, columns, start, depth, panel.data());
      table.multiply(a + row * k + start, k, rows, panel.data(), depth, c + row * n + column, n, columns, start > 0);
    }
  });
}

}  // namespace metalens::cpu
