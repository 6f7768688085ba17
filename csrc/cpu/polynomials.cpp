#include "cpu/polynomials.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/symmetric_tiles.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

// Compute every block of a product, and let finish(task, block) write it.
template <typename Finish>
void for_blocks(const SymmetricTiles& tiles, const Finish& finish) {
  parallel_for(int64_t(tiles.tasks().size()), [&](int64_t t) {
    const auto& task = tiles.tasks()[t];
    const Buffer<float> block(SymmetricTiles::kRows * SymmetricTiles::kColumns);
    tiles.multiply(task, block.data());
    finish(task, block.data());
  });
}

// The even part of polynomials, without its constant: b s^2 + c s^4 of the singular values.
class EvenPart {
 public:
  EvenPart(const Multiplier& tiles, int64_t n, int64_t k) : n_(n), of_rows_(tiles, Element::f32, n, k), of_squares_(tiles, Element::f32, n, n) {
  }

  // factor = b S + c S^2 for S = x x^T
  void run(const float* x, const OddPolynomial& p, float* factor) {
    of_rows_.pack(x, false);
    for_blocks(of_rows_, [&](const auto& task, float* block) { of_rows_.write_mirrored(task, block, squares_.data()); });
    of_squares_.pack(squares_.data(), true);
    for_blocks(of_squares_, [&](const auto& task, float* block) {
      for (int64_t i = 0; i < task.rows; ++i) {
        const float* squares = squares_.data() + (task.row + i) * n_ + task.column;
        float* row = block + i * SymmetricTiles::kColumns;
        for (int64_t j = 0; j < task.columns; ++j) row[j] = p.b * squares[j] + p.c * row[j];
      }
      of_squares_.write_mirrored(task, block, factor);
    });
  }

 private:
  int64_t n_;
  SymmetricTiles of_rows_, of_squares_;
  const Buffer<float> squares_{n_ * n_};
};

// The product with a symmetric matrix [n, n] on the left, whose rows and whose panels on the right [n, k] are packed once.
class LastProduct {
 public:
  LastProduct(const Multiplier& tiles, int64_t n, int64_t k)
      : tiles_(tiles),
        n_(n),
        k_(k),
        panels_((k + tiles.panel_width - 1) / tiles.panel_width),
        blocks_((n + kReductionBlock - 1) / kReductionBlock),
        packed_(panels_ * blocks_ * tiles.panel_bytes) {
    for (int64_t row = 0; row < n; row += kRows) lefts_.emplace_back(tiles, std::min(kRows, n - row), n);
  }

  // out = a x + factor x
  void run(const float* factor, float a, const float* x, float* out) {
    const int64_t row_blocks = int64_t(lefts_.size()), width = tiles_.panel_width;
    const Matrix w{n_, k_, Element::f32, Format::dense, 0, 0, x, nullptr, nullptr};
    parallel_for(row_blocks + panels_, [&](int64_t i) {
      if (i < row_blocks) return lefts_[i].pack(factor + i * kRows * n_, n_);
      const int64_t column = (i - row_blocks) * width;
      for (int64_t start = 0; start < n_; start += kReductionBlock) {
        tiles_.pack_columns(w, column, std::min(width, k_ - column), start, std::min(kReductionBlock, n_ - start), panel(column, start));
      }
    });
    const int64_t strips = (k_ + kColumns - 1) / kColumns;
    parallel_for(row_blocks * strips, [&](int64_t task) {
      const Left& left = lefts_[task / strips];
      const int64_t row = task / strips * kRows, column = task % strips * kColumns, columns = std::min(kColumns, k_ - column);
      for (int64_t i = 0; i < left.rows(); ++i) {
        const int64_t at = (row + i) * k_ + column;
        for (int64_t j = 0; j < columns; ++j) out[at + j] = a * x[at + j];
      }
      for (int64_t start = 0; start < n_; start += kReductionBlock) {
        const int64_t depth = std::min(kReductionBlock, n_ - start);
        for (int64_t j = 0; j < columns; j += width) {
          float* c = out + row * k_ + column + j;
          tiles_.multiply(left.block(start), left.rows(), panel(column + j, start), depth, c, k_, std::min(width, columns - j), true);
        }
      }
    });
  }

 private:
  static constexpr int64_t kRows = SymmetricTiles::kRows, kColumns = SymmetricTiles::kColumns;

  std::byte* panel(int64_t column, int64_t start) const {
    return packed_.data() + (column / tiles_.panel_width * blocks_ + start / kReductionBlock) * tiles_.panel_bytes;
  }

  const Multiplier& tiles_;
  int64_t n_, k_, panels_, blocks_;
  std::vector<Left> lefts_;
  Buffer<std::byte> packed_;
};

}  // namespace

void odd_polynomials(Buffer<float>& x, int64_t n, int64_t k, std::span<const OddPolynomial> polynomials, Precision precision) {
  if (n == 0 || k == 0 || polynomials.empty()) return;
  const Multiplier& tiles = multiplier(precision);
  EvenPart even(tiles, n, k);
  LastProduct last(tiles, n, k);
  const Buffer<float> factor(n * n);
  Buffer<float> next(n * k);
  for (const OddPolynomial& p : polynomials) {
    even.run(x.data(), p, factor.data());
    last.run(factor.data(), p.a, x.data(), next.data());
    std::swap(x, next);
  }
}

}  // namespace metalens::cpu
