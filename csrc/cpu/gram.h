// The product of a matrix and its transpose, by half of the work.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace metalens::cpu {

// c = x x^T for each of `count` matrices [n, k], one behind the other; x and c [n, n] hold elements of one type. Computes the triangle on and below
// the diagonal and mirrors it. Sums are float32; their order does not depend on the number of threads.
void gram(const void* x, Element element, int64_t count, int64_t n, int64_t k, Precision precision, void* c);

}  // namespace metalens::cpu
