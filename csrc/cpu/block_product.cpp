#include "cpu/block_product.h"

#include <algorithm>

namespace metalens::cpu {

const Multiplier& multiplier(Precision precision) {
  const auto& table = kernels();
  return precision == Precision::bf16 && table.bf16 ? *table.bf16 : table.float32;
}

Left::Left(const Multiplier& multiplier, int64_t rows, int64_t depth)
    : multiplier_(&multiplier),
      rows_(rows),
      depth_(depth),
      block_bytes_((multiplier.left_bytes(rows, std::min(depth, kReductionBlock)) + 63) / 64 * 64),
      data_((depth + kReductionBlock - 1) / kReductionBlock * block_bytes_) {
}

void Left::pack(const float* a, int64_t lda) {
  for (int64_t start = 0; start < depth_; start += kReductionBlock) {
    multiplier_->pack_left(a + start, lda, rows_, std::min(kReductionBlock, depth_ - start), block(start));
  }
}

void multiply_panel(
    const Multiplier& multiplier,
    std::span<const Product> products,
    const Matrix& w,
    bool transpose,
    int64_t column,
    int64_t width,
    int64_t first,
    void* panel) {
  const auto pack = transpose ? multiplier.pack_rows : multiplier.pack_columns;
  const int64_t reduction = products[0].left.depth();
  for (int64_t start = 0; start < reduction; start += kReductionBlock) {
    const int64_t depth = std::min(kReductionBlock, reduction - start);
    pack(w, column, width, first + start, depth, panel);
    for (const Product& p : products) {
      multiplier.multiply(p.left.block(start), p.left.rows(), panel, depth, p.c, p.ldc, width, p.accumulate || start > 0);
    }
  }
}

BlockProduct::BlockProduct(const Matrix& keys, const Matrix& values, Precision precision)
    : keys_(keys),
      values_(values),
      multiplier_(multiplier(precision)),
      left_(multiplier_, 0, 0),
      rest_(multiplier_, 0, 0),
      weights_(multiplier_, 0, 0),
      panel_(multiplier_.panel_bytes) {
}

void BlockProduct::set_rows(const float* x, int64_t rows, int64_t exact) {
  const int64_t d = keys_.cols;
  x_ = x;
  rows_ = rows;
  if (rows <= kMatvecRows) return;
  left_ = Left(multiplier_, rows, d);
  left_.pack(x, d);
  if (exact == 0 || &multiplier_ != kernels().bf16) return;
  const Buffer<uint16_t> rounded(exact * d);
  const Buffer<float> rest(exact * d);
  const float* from = x + (rows - exact) * d;
  kernels().store(Element::bf16, from, rounded.data(), exact * d);
  kernels().load(Element::bf16, rounded.data(), rest.data(), exact * d);
  for (int64_t i = 0; i < exact * d; ++i) rest.data()[i] = from[i] - rest.data()[i];
  rest_ = Left(multiplier_, exact, d);
  rest_.pack(rest.data(), d);
}

void BlockProduct::forward(int64_t first, int64_t width, float* z) {
  if (rows_ <= kMatvecRows) {
    kernels().matvec_rows(keys_, first, width, x_, keys_.cols, rows_, z, kKeyBlock);
    return;
  }
  for (int64_t j = 0; j < width; j += multiplier_.panel_width) {
    const int64_t columns = std::min<int64_t>(multiplier_.panel_width, width - j);
    const Product products[] = {{left_, z + j, kKeyBlock, false}, {rest_, z + (rows_ - rest_.rows()) * kKeyBlock + j, kKeyBlock, true}};
    multiply_panel(multiplier_, {products, rest_.rows() ? 2u : 1u}, keys_, true, first + j, columns, 0, panel_.data());
  }
}

float BlockProduct::forward_one(const float* row, int64_t key) const {
  float z = 0;
  if (rows_ <= kMatvecRows) {
    kernels().matvec_rows(keys_, key, 1, row, keys_.cols, 1, &z, 1);
  } else {
    Left one(multiplier_, 1, keys_.cols);
    one.pack(row, keys_.cols);
    const Product product{one, &z, 1, false};
    multiply_panel(multiplier_, {&product, 1}, keys_, true, key, 1, 0, panel_.data());
  }
  return z;
}

void BlockProduct::backward(const float* z, int64_t rows, int64_t first, int64_t width, float* sums) {
  const int64_t d = values_.cols;
  if (weights_.rows() != rows || weights_.depth() != width) weights_ = Left(multiplier_, rows, width);
  weights_.pack(z, kKeyBlock);
  for (int64_t column = 0; column < d; column += multiplier_.panel_width) {
    const int64_t columns = std::min<int64_t>(multiplier_.panel_width, d - column);
    const Product product{weights_, sums + column, d, true};
    multiply_panel(multiplier_, {&product, 1}, values_, false, column, columns, first, panel_.data());
  }
}

}  // namespace metalens::cpu
