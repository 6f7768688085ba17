// Products whose result is known to be symmetric: half of the work.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// c = a b^T for each of `count` pairs of matrices [n, k], one behind the other; a, b and c [n, n] hold elements of one type. Computes the triangle on
// and below the diagonal and mirrors it, so c is symmetric whether or not a b^T is. Sums are float32; their order does not depend on the number of
// threads.
void symmetric_product(const void* a, const void* b, Element element, int64_t count, int64_t n, int64_t k, Precision precision, void* c);

}  // namespace metalens::cpu
