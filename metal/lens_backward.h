// lens_backward: dn = scale * (q - p) U, the second product of training. It skips tiles in which every |q - p| is negligible.
//
//               32 ids              BN columns
//            +--------+           +------------+      A threadgroup computes BM rows and BN columns of dn over one split of the vocabulary, 32 ids
//     g  BM  |        |   U   32  |            |      at a time. U is read as it lies in memory, [ids, columns], without a transposition. Several
//            +--------+      ids  +------------+      splits give several sums, which the caller adds in order.
//
// The skipped tiles add less than `negligible` times sum |q - p| times the largest |U|. With 2^-24 that is less than float32's own rounding of the
// sum. The map of lens_softmax_grad holds the largest |q - p| for every row and 32 ids. All simdgroups read the same entries, so all decide alike.
#pragma once

#include "tile.h"

namespace metalens {

struct LensBackwardProblem {
  int rows;           // N
  int width;          // V: the length of a row of g
  int vocab;          // ids below it are tokens
  int columns;        // D
  int ids_per_split;  // a multiple of 32
  float negligible;   // the fraction of a row's sum |q - p| that all skipped tiles together may hold; negative: skip nothing
  float scale;        // the head's scale, divided by grad_scale
};

// Whether some row of the block has a |q - p| that is not negligible for these 32 ids.
METAL_FUNC bool matters(
    const device LensBackwardProblem& problem,
    const device float* tile_absmax,
    const device float* row_l1,
    int first_row,
    int rows,
    int base,
    uint lane) {
  const int map_columns = (problem.width + MAP_WIDTH - 1) / MAP_WIDTH;
  bool any = false;
  for (int i = int(lane); i < rows; i += LANES) {
    const int row = first_row + i;
    if (row < problem.rows) {
      const float absmax = tile_absmax[long(row) * map_columns + base / MAP_WIDTH];
      any = any || !(absmax * float(problem.vocab) <= problem.negligible * row_l1[row]);  // true also if the row is NaN
    }
  }
  return simd_any(any);
}

template <typename G, typename Format, typename Tiles>
METAL_FUNC void lens_backward(
    const device G* g,                // [N, V]
    const device float* tile_absmax,  // [N, ceil(V / 32)]
    const device float* row_l1,       // [N]
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device int* problem_words,
    device float* dn,  // [splits, N, D]
    threadgroup float* shared,
    uint3 group,
    uint simd,
    uint lane) {
  using Operand = typename Tiles::Operand;
  static_assert(Tiles::BK == MAP_WIDTH, "a step covers the ids of one entry of the map");
  constexpr int pitch_u = Tiles::BN + 16 / int(sizeof(Operand));
  static_assert((Tiles::BM * Tiles::PITCH + Tiles::BK * pitch_u) * int(sizeof(Operand)) / 4 <= Tiles::FLOATS, "the operands fit");
  const device LensBackwardProblem& problem = *reinterpret_cast<const device LensBackwardProblem*>(problem_words);
  threadgroup Operand* gs = reinterpret_cast<threadgroup Operand*>(shared);
  threadgroup Operand* us = gs + Tiles::BM * Tiles::PITCH;
  const int me = thread_index(simd, lane);
  const int first_row = int(group.x) * Tiles::BM;
  const int first_column = int(group.y) * Tiles::BN;

  Accumulators<Tiles> acc;
  clear(acc);
  float unit[UNIT];
  const int begin = int(group.z) * problem.ids_per_split;
  const int end = min(begin + problem.ids_per_split, problem.vocab);
  for (int base = begin; base < end; base += Tiles::BK) {
    if (!matters(problem, tile_absmax, row_l1, first_row, Tiles::BM, base, lane)) {
      continue;  // every simdgroup skips this tile
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last operands have been read
    for (int u = me; u < Tiles::BM * Tiles::BK / 4; u += THREADS) {
      const Place p = place<Tiles::BK / 4>(u);
      const int row = first_row + p.row;
      const float4 four = load_four(g + long(row) * problem.width, base + p.part * 4, row < problem.rows ? end : 0);
      store_four(four, gs + p.row * Tiles::PITCH + p.part * 4);
    }
    for (int u = me; u < Tiles::BK * Tiles::BN / UNIT; u += THREADS) {
      const Place p = place<Tiles::BN / UNIT>(u);
      const int id = base + p.row < end ? base + p.row : -1;
      load_weight_unit<Format>(values, scales, biases, id, first_column + p.part * UNIT, problem.columns, unit);
      store_unit(unit, us + p.row * pitch_u + p.part * UNIT);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply<Tiles, false, pitch_u>(acc, gs, us, simd);
  }

  put_tile(acc, shared, simd);
  for (int at = me; at < Tiles::BM * Tiles::BN / 4; at += THREADS) {
    const int row = first_row + at / (Tiles::BN / 4);
    const int part = at % (Tiles::BN / 4) * 4;
    if (row < problem.rows) {
      const float4 sums = load_four(shared + at / (Tiles::BN / 4) * PITCH_Z + part);
      device float* to = dn + (long(group.z) * problem.rows + row) * problem.columns;
      store_four(sums * problem.scale, to, first_column + part, problem.columns);
    }
  }
}

}  // namespace metalens
