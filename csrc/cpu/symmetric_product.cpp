#include "cpu/symmetric_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/buffer.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

// Rows and columns of a task. The task's part of the result, its rows on the left and its panels in one block of the reduction fit the L2 cache. What
// a task computes above the diagonal is lost, so there are few rows: with 192 a matrix of 576 rows cost a third more than its half.
constexpr int64_t kRows = 48, kColumns = 128;

int64_t parts(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

const std::byte* at(const void* p, int64_t element_count, Element element) {
  return static_cast<const std::byte*>(p) + element_count * element_size(element);
}

// One product, packed once: every row block and every panel serves many tasks.
class Packed {
 public:
  Packed(const Multiplier& tiles, Element element, int64_t n, int64_t k)
      : tiles_(tiles), element_(element), n_(n), k_(k), panels_(parts(n, tiles.panel_width) * parts(k, kReductionBlock) * tiles.panel_bytes) {
    for (int64_t row = 0; row < n; row += kRows) lefts_.emplace_back(tiles, std::min(kRows, n - row), k);
  }

  void pack(const void* a, const void* b) {
    const int64_t row_blocks = int64_t(lefts_.size()), column_panels = parts(n_, tiles_.panel_width);
    const Matrix w{n_, k_, element_, Format::dense, 0, 0, b, nullptr, nullptr};
    parallel_for(row_blocks + column_panels, [&](int64_t task) {
      if (task < row_blocks) {
        pack_rows(at(a, task * kRows * k_, element_), lefts_[task]);
      } else {
        const int64_t column = (task - row_blocks) * tiles_.panel_width;
        for (int64_t start = 0; start < k_; start += kReductionBlock) {
          const int64_t width = std::min<int64_t>(tiles_.panel_width, n_ - column);
          tiles_.pack_rows(w, column, width, start, std::min(kReductionBlock, k_ - start), panel(column, start));
        }
      }
    });
  }

  // block = the rows of `row_block` times columns [column, column + width); row stride kColumns.
  void multiply(int64_t row_block, int64_t column, int64_t width, float* block) const {
    const Left& left = lefts_[row_block];
    for (int64_t start = 0; start < k_; start += kReductionBlock) {
      const int64_t depth = std::min(kReductionBlock, k_ - start);
      for (int64_t j = 0; j < width; j += tiles_.panel_width) {
        const int64_t columns = std::min<int64_t>(tiles_.panel_width, width - j);
        tiles_.multiply(left.block(start), left.rows(), panel(column + j, start), depth, block + j, kColumns, columns, start > 0);
      }
    }
  }

 private:
  void pack_rows(const std::byte* a, Left& left) const {
    if (element_ == Element::f32) return left.pack(reinterpret_cast<const float*>(a), k_);
    const Buffer<float> wide(left.rows() * k_);
    kernels().load(element_, a, wide.data(), left.rows() * k_);
    left.pack(wide.data(), k_);
  }
  std::byte* panel(int64_t column, int64_t start) const {
    return panels_.data() + (column / tiles_.panel_width * parts(k_, kReductionBlock) + start / kReductionBlock) * tiles_.panel_bytes;
  }

  const Multiplier& tiles_;
  Element element_;
  int64_t n_, k_;
  std::vector<Left> lefts_;
  Buffer<std::byte> panels_;
};

// Write the part of a block that lies on or below the diagonal, and its mirror image. The block's first element is c[row, column].
void write_mirrored(const float* block, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t n, Element element, void* c) {
  std::byte* out = static_cast<std::byte*>(c);
  const int64_t size = element_size(element);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t count = std::min(columns, row + i - column + 1);
    if (count > 0) kernels().store(element, block + i * kColumns, out + ((row + i) * n + column) * size, count);
  }
  float mirrored[kRows];
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t first = std::max<int64_t>(0, column + j + 1 - row);  // the first row below the diagonal
    if (first >= rows) continue;
    for (int64_t i = first; i < rows; ++i) mirrored[i] = block[i * kColumns + j];
    kernels().store(element, mirrored + first, out + ((column + j) * n + row + first) * size, rows - first);
  }
}

}  // namespace

void symmetric_product(const void* a, const void* b, Element element, int64_t count, int64_t n, int64_t k, Precision precision, void* c) {
  if (count == 0 || n == 0) return;
  if (k == 0) {
    std::memset(c, 0, count * n * n * element_size(element));
    return;
  }
  // bfloat16 elements lose nothing on a multiplier of that type.
  const Multiplier& tiles = multiplier(element == Element::bf16 ? Precision::bf16 : precision);
  struct Task {
    int64_t row_block, column;
  };
  std::vector<Task> tasks;
  for (int64_t row = 0; row < n; row += kRows) {
    for (int64_t column = 0; column < std::min(n, row + kRows); column += kColumns) tasks.push_back({row / kRows, column});
  }
  Packed packed(tiles, element, n, k);
  for (int64_t i = 0; i < count; ++i) {
    packed.pack(at(a, i * n * k, element), at(b, i * n * k, element));
    std::byte* result = static_cast<std::byte*>(c) + i * n * n * element_size(element);
    parallel_for(int64_t(tasks.size()), [&](int64_t task) {
      const auto [row_block, column] = tasks[task];
      const int64_t row = row_block * kRows, rows = std::min(kRows, n - row);
      const int64_t columns = std::min({kColumns, n - column, row + rows - column});
      const Buffer<float> block(kRows * kColumns);
      packed.multiply(row_block, column, columns, block.data());
      write_mirrored(block.data(), row, rows, column, columns, n, element, result);
    });
  }
}

}  // namespace metalens::cpu
