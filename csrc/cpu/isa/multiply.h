// The register tile of the float32 product: METALENS_ROWS x 2 vectors of accumulators. Each step of the reduction loads two vectors of the panel and
// broadcasts one value of each row on the left.
#pragma once

#include "cpu/isa/panels.h"

namespace metalens::cpu::METALENS_ISA {

template <int rows>
inline void tile(const float* a, const float* panel, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate) {
  vec acc[rows][2];
  for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = vec{};
  for (int64_t k = 0; k < depth; ++k, panel += kWidth) {
    const vec b0 = load_vec(panel);
    const vec b1 = load_vec(panel + kVector);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const float x = a[r * depth + k];
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
  for (int r = 0; r < rows; ++r, c += ldc) {
    if (width == kWidth) {
      store_vec(c, accumulate ? load_vec(c) + acc[r][0] : acc[r][0]);
      store_vec(c + kVector, accumulate ? load_vec(c + kVector) + acc[r][1] : acc[r][1]);
    } else {
      float all[kWidth];  // indexing a lane by a variable would keep all accumulators in memory
      store_vec(all, acc[r][0]);
      store_vec(all + kVector, acc[r][1]);
      for (int64_t j = 0; j < width; ++j) c[j] = accumulate ? c[j] + all[j] : all[j];
    }
  }
}

// The rows that are left over at the end, at most `most`, in one tile.
template <int most>
inline void last_tile(int64_t rows, const float* a, const float* panel, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate) {
  if constexpr (most > 0) {
    if (rows == most) return tile<most>(a, panel, depth, c, ldc, width, accumulate);
    last_tile<most - 1>(rows, a, panel, depth, c, ldc, width, accumulate);
  }
}

void multiply(const void* left, int64_t rows, const void* packed, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate) {
  const float* a = static_cast<const float*>(left);
  const float* panel = static_cast<const float*>(packed);
  int64_t m = 0;
  for (; m + METALENS_ROWS <= rows; m += METALENS_ROWS) tile<METALENS_ROWS>(a + m * depth, panel, depth, c + m * ldc, ldc, width, accumulate);
  last_tile<METALENS_ROWS - 1>(rows - m, a + m * depth, panel, depth, c + m * ldc, ldc, width, accumulate);
}

}  // namespace metalens::cpu::METALENS_ISA
