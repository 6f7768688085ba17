// The product with a frozen matrix, over all threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// c [m, n] = a [m, k] W^T (transpose; W is [n, k]) or a [m, k] W (W is [k, n]); a and c are row-contiguous. The order
// of the sums, and so the result, does not depend on the number of threads.
void gemm(const float* a, int64_t m, int64_t n, int64_t k, const Matrix& w, bool transpose, Precision precision, float* c);

}  // namespace metalens::cpu
