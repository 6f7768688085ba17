// Memory for the rows on the left of a matrix-vector product.
#pragma once

#include "cpu/kernels.h"

namespace metalens::cpu::METALENS_ISA {

// Floats that begin at a cache line, since a load across two takes twice as long. On the heap only for widths that few models have. `new` instead of
// a vector: a unit includes nothing of the standard library (see cpu/kernels.h).
class AlignedRows {
 public:
  AlignedRows(int64_t rows, int64_t stride) {
    if (rows * stride > int64_t(sizeof(local_) / sizeof(float))) heap_ = new float[rows * stride + 16];
  }
  ~AlignedRows() {
    delete[] heap_;
  }
  AlignedRows(const AlignedRows&) = delete;
  AlignedRows& operator=(const AlignedRows&) = delete;

  float* data() {
    return heap_ ? reinterpret_cast<float*>((reinterpret_cast<uint64_t>(heap_) + 63) / 64 * 64) : local_;
  }

 private:
  alignas(64) float local_[kMatvecRows * 2048];
  float* heap_ = nullptr;
};

}  // namespace metalens::cpu::METALENS_ISA
