// The product with a frozen matrix, over all threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// The rows on the left of a product, or its result, as they lie in memory: row-contiguous.
struct Rows {
  const void* data;
  Element element;
};
struct Result {
  void* data;
  Element element;
};

// c [m, n] = a [m, k] W^T (transpose; W is [n, k]) or a [m, k] W (W is [k, n]). The order of the sums, and so the result, does not depend on the
// number of threads. Sums are float32 and are rounded once. Where a and a dense W hold bfloat16, more than kMatvecRows rows are multiplied as such in
// either precision, since that loses nothing.
void gemm(const Rows& a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, const Result& c);

// The same for float32.
void gemm(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, float* c);

}  // namespace metalens::cpu
