// Rows of any float type, wherever the strides of an array put them; and results, which are contiguous.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {

// The rows [count, width] of an array. Its leading axes may have any strides, also zero; so may the last one.
class StridedRows {
 public:
  StridedRows() = default;
  // `shape` and `strides`, in elements, of all axes; the last axis is the row. Without axes there is one row of one element.
  StridedRows(const void* data, Element element, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);

  int64_t count() const {
    return count_;
  }
  int64_t width() const {
    return width_;
  }
  Element element() const {
    return element_;
  }
  // The elements [first, first + n) of a row as floats: in place if they lie so in memory, else widened into `scratch`.
  const float* read(int64_t row, int64_t first, int64_t n, float* scratch) const;
  // The same, always in `to`.
  void copy(int64_t row, int64_t first, int64_t n, float* to) const;
  // The rows first, first + 1, ... first + n - 1 if they follow each other in memory without gaps, else null.
  const void* block(int64_t first, int64_t n) const;

 private:
  int64_t start(int64_t row) const;

  const void* data_ = nullptr;
  Element element_ = Element::f32;
  int64_t count_ = 0, width_ = 0, step_ = 1;
  // Leading axes, outermost first. Axes that one stride describes are one axis here.
  std::vector<int64_t> sizes_, strides_;
};

// A contiguous result of any float type.
struct Output {
  void* data;
  Element element;

  // Where to compute n elements from `offset` on: in place if they are floats, else in `scratch`, from which `finish` narrows them.
  float* at(int64_t offset, float* scratch) const {
    return element == Element::f32 ? static_cast<float*>(data) + offset : scratch;
  }
  void finish(int64_t offset, int64_t n, const float* scratch) const {
    if (element != Element::f32) kernels().store(element, scratch, static_cast<char*>(data) + offset * element_size(element), n);
  }
};

// Call f(row, first, n) for pieces of all rows, at most kPiece elements each, over all threads.
constexpr int64_t kPiece = 2048;

template <typename F>
void for_pieces(int64_t rows, int64_t width, const F& f) {
  if (rows == 0 || width == 0) return;
  constexpr int64_t kElements = 16384;  // of a task: less would not pay for waking a thread
  const int64_t pieces = (width + kPiece - 1) / kPiece, total = rows * pieces;
  const int64_t run = std::max<int64_t>(1, kElements / std::min(width, kPiece));
  parallel_for((total + run - 1) / run, [&](int64_t task) {
    for (int64_t i = task * run; i < std::min(total, (task + 1) * run); ++i) {
      const int64_t first = i % pieces * kPiece;
      f(i / pieces, first, std::min(kPiece, width - first));
    }
  });
}

}  // namespace metalens::cpu
