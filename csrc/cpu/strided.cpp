#include "cpu/strided.h"

#include <algorithm>

namespace metalens::cpu {

StridedRows::StridedRows(const void* data, Element element, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides)
    : data_(data), element_(element), count_(1), width_(shape.empty() ? 1 : shape.back()), step_(shape.empty() ? 1 : strides.back()) {
  for (size_t axis = 0; axis + 1 < shape.size(); ++axis) {
    count_ *= shape[axis];
    if (shape[axis] == 1) continue;
    if (!sizes_.empty() && strides_.back() == shape[axis] * strides[axis]) {
      sizes_.back() *= shape[axis];
      strides_.back() = strides[axis];
    } else {
      sizes_.push_back(shape[axis]);
      strides_.push_back(strides[axis]);
    }
  }
}

int64_t StridedRows::start(int64_t row) const {
  if (sizes_.size() == 1) return row * strides_[0];
  int64_t offset = 0;
  for (size_t axis = sizes_.size(); axis-- > 0;) {
    offset += row % sizes_[axis] * strides_[axis];
    row /= sizes_[axis];
  }
  return offset;
}

const float* StridedRows::read(int64_t row, int64_t first, int64_t n, float* scratch) const {
  if (element_ == Element::f32 && step_ == 1) return static_cast<const float*>(data_) + start(row) + first;
  copy(row, first, n, scratch);
  return scratch;
}

void StridedRows::copy(int64_t row, int64_t first, int64_t n, float* to) const {
  const int64_t size = element_size(element_);
  const char* from = static_cast<const char*>(data_) + (start(row) + first * step_) * size;
  if (step_ == 1) return kernels().load(element_, from, to, n);
  if (step_ == 0) {
    kernels().load(element_, from, to, 1);
    std::fill(to + 1, to + n, to[0]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) kernels().load(element_, from + i * step_ * size, to + i, 1);
}

const void* StridedRows::block(int64_t first, int64_t n) const {
  if (n == 0) return data_;
  const bool one_axis = sizes_.empty() || first / sizes_.back() == (first + n - 1) / sizes_.back();
  if (step_ != 1 || (n > 1 && (!one_axis || strides_.back() != width_))) return nullptr;
  return static_cast<const char*>(data_) + start(first) * element_size(element_);
}

}  // namespace metalens::cpu
