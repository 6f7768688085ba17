// The operands of x x^T, packed once, and the tasks that compute its triangle on and below the diagonal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"

namespace metalens::cpu {

// x x^T [n, n] for x [n, k]. Every packed block of rows and every panel serves many tasks.
class SymmetricTiles {
 public:
  // Rows and columns of a task. The task's part of the result, its rows on the left and its panels in one block of the reduction fit the L2 cache.
  // What a task computes above the diagonal is lost, so there are few rows: with 192 a matrix of 576 rows cost a third more than its half.
  static constexpr int64_t kRows = 48, kColumns = 128;

  // A task computes rows x columns elements of the result, from c[row, column] on.
  struct Task {
    int64_t row, rows, column, columns;
  };

  SymmetricTiles(const Multiplier& tiles, Element element, int64_t n, int64_t k);

  // Pack x, row-contiguous. `symmetric`: x is a symmetric matrix; as the right operand its columns are packed in place of its rows, with less work.
  void pack(const void* x, bool symmetric);

  const std::vector<Task>& tasks() const {
    return tasks_;
  }

  // block[i, j] = element (row + i, column + j) of the product; row stride kColumns.
  void multiply(const Task& task, float* block) const;

  // Write the part of a block that lies on or below the diagonal of c, and its mirror image.
  void write_mirrored(const Task& task, const float* block, void* c) const;

 private:
  std::byte* panel(int64_t column, int64_t start) const;

  const Multiplier& tiles_;
  Element element_;
  int64_t n_, k_;
  std::vector<Left> lefts_;
  Buffer<std::byte> panels_;
  std::vector<Task> tasks_;
};

}  // namespace metalens::cpu
