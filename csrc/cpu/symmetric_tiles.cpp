#include "cpu/symmetric_tiles.h"

#include <algorithm>

#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

int64_t parts(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

const std::byte* at(const void* p, int64_t element_count, Element element) {
  return static_cast<const std::byte*>(p) + element_count * element_size(element);
}

void pack_rows(const std::byte* a, Element element, int64_t k, Left& left) {
  if (element == Element::f32) return left.pack(reinterpret_cast<const float*>(a), k);
  const Buffer<float> wide(left.rows() * k);
  kernels().load(element, a, wide.data(), left.rows() * k);
  left.pack(wide.data(), k);
}

}  // namespace

SymmetricTiles::SymmetricTiles(const Multiplier& tiles, Element element, int64_t n, int64_t k)
    : tiles_(tiles), element_(element), n_(n), k_(k), panels_(parts(n, tiles.panel_width) * parts(k, kReductionBlock) * tiles.panel_bytes) {
  for (int64_t row = 0; row < n; row += kRows) {
    const int64_t rows = std::min(kRows, n - row), below = row + rows;
    lefts_.emplace_back(tiles, rows, k);
    for (int64_t column = 0; column < below; column += kColumns) tasks_.push_back({row, rows, column, std::min(kColumns, below - column)});
  }
}

void SymmetricTiles::pack(const void* x, bool symmetric) {
  const int64_t row_blocks = int64_t(lefts_.size()), column_panels = parts(n_, tiles_.panel_width);
  const Matrix w{n_, k_, element_, Format::dense, 0, 0, x, nullptr, nullptr};
  const auto pack_panel = symmetric ? tiles_.pack_columns : tiles_.pack_rows;
  parallel_for(row_blocks + column_panels, [&](int64_t i) {
    if (i < row_blocks) return pack_rows(at(x, i * kRows * k_, element_), element_, k_, lefts_[i]);
    const int64_t column = (i - row_blocks) * tiles_.panel_width, width = std::min<int64_t>(tiles_.panel_width, n_ - column);
    for (int64_t start = 0; start < k_; start += kReductionBlock) {
      pack_panel(w, column, width, start, std::min(kReductionBlock, k_ - start), panel(column, start));
    }
  });
}

void SymmetricTiles::multiply(const Task& task, float* block) const {
  const Left& left = lefts_[task.row / kRows];
  for (int64_t start = 0; start < k_; start += kReductionBlock) {
    const int64_t depth = std::min(kReductionBlock, k_ - start);
    for (int64_t j = 0; j < task.columns; j += tiles_.panel_width) {
      const int64_t width = std::min<int64_t>(tiles_.panel_width, task.columns - j);
      tiles_.multiply(left.block(start), task.rows, panel(task.column + j, start), depth, block + j, kColumns, width, start > 0);
    }
  }
}

void SymmetricTiles::write_mirrored(const Task& task, const float* block, void* c) const {
  const auto [row, rows, column, columns] = task;
  const auto& table = kernels();
  const int64_t size = element_size(element_);
  const auto out = [&, n = n_](int64_t i, int64_t j) { return static_cast<std::byte*>(c) + (i * n + j) * size; };
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t count = std::min(columns, row + i - column + 1);
    if (count > 0) table.store(element_, block + i * kColumns, out(row + i, column), count);
  }
  // Columns to the left of the square on the diagonal are mirrored as a whole.
  const int64_t whole = std::clamp<int64_t>(row - column, 0, columns);
  if (element_ == Element::f32) {
    table.transpose_block(block, kColumns, rows, whole, reinterpret_cast<float*>(out(column, row)), n_);
  } else {
    float mirrored[kColumns * kRows];
    table.transpose_block(block, kColumns, rows, whole, mirrored, kRows);
    for (int64_t j = 0; j < whole; ++j) table.store(element_, mirrored + j * kRows, out(column + j, row), rows);
  }
  float mirrored[kRows];
  for (int64_t j = whole; j < columns; ++j) {
    const int64_t first = column + j + 1 - row;  // the first row below the diagonal
    for (int64_t i = first; i < rows; ++i) mirrored[i] = block[i * kColumns + j];
    if (first < rows) table.store(element_, mirrored + first, out(column + j, row + first), rows - first);
  }
}

std::byte* SymmetricTiles::panel(int64_t column, int64_t start) const {
  return panels_.data() + (column / tiles_.panel_width * parts(k_, kReductionBlock) + start / kReductionBlock) * tiles_.panel_bytes;
}

}  // namespace metalens::cpu
