// Transposition of a square of words, one vector to a row, in registers.
#pragma once

#include "cpu/isa/vector.h"

namespace metalens::cpu::METALENS_ISA {

// The numbers 0 ... n - 1 as template arguments, which give the constants of a shuffle.
template <int... lane>
struct Lanes {};

template <int n>
constexpr auto lanes_below() {
  if constexpr (n == 4) {
    return Lanes<0, 1, 2, 3>{};
  } else if constexpr (n == 8) {
    return Lanes<0, 1, 2, 3, 4, 5, 6, 7>{};
  } else {
    static_assert(n == 16);
    return Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>{};
  }
}

// Rows i and i + size run through squares of 2 x 2 blocks, each block `size` lanes wide. Swap the two blocks off the diagonal of each square.
template <int size, typename V, int... lane>
inline void swap_blocks(V& upper, V& lower, Lanes<lane...>) {
  constexpr int n = sizeof...(lane);
  const V swapped = __builtin_shufflevector(upper, lower, (lane & size ? n + lane - size : lane)...);
  lower = __builtin_shufflevector(upper, lower, (lane & size ? n + lane : lane + size)...);
  upper = swapped;
}

template <int size, typename V>
inline void swap_all_blocks(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kVector; ++i) {
    if (!(i & size)) swap_blocks<size>(rows[i], rows[i + size], lanes_below<kVector>());
  }
}

template <typename V>
inline void transpose(V* rows) {
  swap_all_blocks<1>(rows);
  swap_all_blocks<2>(rows);
  if constexpr (kVector > 4) swap_all_blocks<4>(rows);
  if constexpr (kVector > 8) swap_all_blocks<8>(rows);
}

// to[j, i] = from[i, j] for i < rows and j < columns; ldf and ldt are row strides.
void transpose_block(const float* from, int64_t ldf, int64_t rows, int64_t columns, float* to, int64_t ldt) {
  int64_t i = 0;
  for (; i + kVector <= rows; i += kVector) {
    int64_t j = 0;
    for (; j + kVector <= columns; j += kVector) {
      vec square[kVector];
#pragma GCC unroll 16
      for (int lane = 0; lane < kVector; ++lane) square[lane] = load_vec(from + (i + lane) * ldf + j);
      transpose(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < kVector; ++lane) store_vec(to + (j + lane) * ldt + i, square[lane]);
    }
    for (; j < columns; ++j) {
      for (int lane = 0; lane < kVector; ++lane) to[j * ldt + i + lane] = from[(i + lane) * ldf + j];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * ldt + i] = from[i * ldf + j];
  }
}

}  // namespace metalens::cpu::METALENS_ISA
