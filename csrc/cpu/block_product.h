// Products with a frozen matrix, tile by tile: the building blocks of gemm, attention, lens_stats, lens_target and lens_kl.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// The multiplier for this precision in the instruction set in use.
const Multiplier& multiplier(Precision precision);

// The rows [rows, depth] on the left of a product, packed once for all panels.
class Left {
 public:
  Left(const Multiplier& multiplier, int64_t rows, int64_t depth);

  // Pack a [rows, depth], row stride lda.
  void pack(const float* a, int64_t lda);

  int64_t rows() const {
    return rows_;
  }
  int64_t depth() const {
    return depth_;
  }
  // The part of the packed rows in the block of the reduction that begins at `start`.
  void* block(int64_t start) const {
    return data_.data() + start / kReductionBlock * block_bytes_;
  }

 private:
  const Multiplier* multiplier_;
  int64_t rows_, depth_, block_bytes_;
  Buffer<std::byte> data_;
};

// c[:, 0:width] = left W^T or left W, added to c if `accumulate`; ldc is c's row stride.
struct Product {
  const Left& left;
  float* c;
  int64_t ldc;
  bool accumulate;
};

// Compute products of one depth that share a panel: the output columns [column, column + width), at most a panel's width, of left W^T (transpose) or
// left W. The reduction starts at the first column of W if transposed, else at its row `first`. `panel` is scratch of multiplier.panel_bytes.
void multiply_panel(
    const Multiplier& multiplier,
    std::span<const Product> products,
    const Matrix& w,
    bool transpose,
    int64_t column,
    int64_t width,
    int64_t first,
    void* panel);

// Rows of `keys` in one block of a BlockProduct. They are also the reduction of the way back, so a block is at most one block of the reduction.
constexpr int64_t kKeyBlock = 256;
static_assert(kKeyBlock <= kReductionBlock);

// The two products of a softmax over the rows of a matrix, one block of those at a time. Rows times `keys`^T gives logits; weights times `values`
// gives sums. For a head both matrices are U; for attention they are its keys and values.
class BlockProduct {
 public:
  BlockProduct(const Matrix& keys, const Matrix& values, Precision precision);

  // Set the rows: x [rows, D], row stride D = keys.cols. Up to kMatvecRows rows are not packed, so x must stay unchanged. If operands are 16 bits
  // wide, the last `exact` rows are multiplied in two parts, which keeps the precision of float32.
  void set_rows(const float* x, int64_t rows, int64_t exact = 0);

  // z[r, j] = row r . keys[first + j], for j < width <= kKeyBlock; row stride kKeyBlock.
  void forward(int64_t first, int64_t width, float* z);

  // The same for one row and one key; equals the result of forward() to the last bit.
  float forward_one(const float* row, int64_t key) const;

  // sums[r, :] += z[r, 0:width] values[first : first + width], for `rows` rows; row stride values.cols.
  void backward(const float* z, int64_t rows, int64_t first, int64_t width, float* sums);

 private:
  const Matrix& keys_;
  const Matrix& values_;
  const Multiplier& multiplier_;
  const float* x_ = nullptr;
  int64_t rows_ = 0;
  Left left_, rest_, weights_;
  Buffer<std::byte> panel_;
};

}  // namespace metalens::cpu
