// linear: y = scale * (x W^T + bias) in float32. It computes the logits of a chunk, and translators.
#pragma once

#include "tile.h"

namespace metalens {

struct LinearProblem {
  int rows;     // N
  int depth;    // D
  int columns;  // V: rows of W
  int with_bias;
  float scale;
};

template <typename T, typename Format, typename Tiles>
METAL_FUNC void linear(
    const device T* x,  // [N, D]
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* bias,  // [V], if there is one
    const device int* problem_words,
    device float* y,  // [N, V]
    threadgroup float* shared,
    uint3 group,
    uint simd,
    uint lane) {
  const device LinearProblem& problem = *reinterpret_cast<const device LinearProblem*>(problem_words);
  PlainRows<T> rows;
  rows.x = x;
  rows.first = int(group.x) * Tiles::BM;
  rows.count = problem.rows;
  rows.depth = problem.depth;
  const PlainColumns columns = plain_columns(int(group.y) * Tiles::BN, problem.columns);
  tile_product<Format>(Tiles(), rows, columns, values, scales, biases, problem.depth, shared, simd, lane);

  for (int at = thread_index(simd, lane); at < Tiles::BM * Tiles::BN / 4; at += THREADS) {
    const int i = at / (Tiles::BN / 4);
    const int part = at % (Tiles::BN / 4) * 4;
    if (rows.first + i < problem.rows) {
      const int column = columns.first + part;
      const float4 products = load_four(shared + i * PITCH_Z + part);
      const float4 of_bias = problem.with_bias != 0 ? load_four(bias, column, problem.columns) : float4(0.0f);
      device float* to = y + long(rows.first + i) * problem.columns;
      store_four((products + of_bias) * problem.scale, to, column, problem.columns);
    }
  }
}

}  // namespace metalens
