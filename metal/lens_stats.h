// lens_stats: the product U n and all statistics of its logits in one kernel. No logit is written.
//
// A threadgroup computes a block of rows over one split of the vocabulary, a tile of BN ids at a time. After each product, every simdgroup reads its
// quarter of the tile's rows, 32 ids at a time with one id in each lane, and updates the state of each row: the running softmax, the comparison with
// the model, the top k, and the number of tokens above the label. Lane i holds the state of the simdgroup's i-th row; the top k lie across the lanes.
// lens_stats_merge then merges the splits.
//
// Tokens above the label can be counted only once the label's own logit is known. So the first tile has as columns the labels of the block's rows.
// Its diagonal gives those logits, computed exactly as in the tiles of the vocabulary.
#pragma once

#include "stats_rows.h"
#include "tile.h"

namespace metalens {

template <typename T, typename Format, typename Tiles>
METAL_FUNC void lens_stats(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,    // [V], if there is one
    const device float* head_offset,  // [V], if there is one
    const device int* labels,         // [label_tokens]
    const device int* problem_words,
    device float* states,      // [splits, blocks, BM, FIELDS]
    device int* above,         // [splits, blocks, BM]
    device float* top_logits,  // [splits, blocks, BM, k]
    device int* top_ids,       // [splits, blocks, BM, k]
    threadgroup float* shared,
    uint3 group,
    uint3 groups,
    uint simd,
    uint lane) {
  constexpr int mine = Tiles::BM / SIMDS;
  static_assert(Tiles::BM % SIMDS == 0 && mine <= LANES, "each simdgroup reads a quarter of the rows, and a lane keeps the state of one");
  static_assert(Tiles::BM <= Tiles::BN, "the labels of all rows fit one tile");
  const device StatsProblem& problem = *reinterpret_cast<const device StatsProblem*>(problem_words);
  const int block = int(group.x);
  const int first_slot = int(simd) * mine;

  LensRows<T> rows;
  rows.problem = &problem;
  rows.n = n;
  rows.n_model = n_model;
  rows.block = block;

  // The slot of the row with which this lane's row is compared; its own slot if there is no model, -1 if the lane has no row.
  const Slot slot = slot_at(problem, block, first_slot + min(int(lane), mine - 1));
  const int my_partner = !slot.used ? -1 : problem.with_model != 0 ? slot.model : first_slot + int(lane);

  RowState state = no_state();
  TopList top[mine];
  METALENS_UNROLL
  for (int i = 0; i < mine; ++i) {
    top[i] = empty_list();
  }

  if (problem.label_tokens != 0) {
    LabelColumns columns;
    columns.problem = &problem;
    columns.labels = labels;
    columns.block = block;
    tile_product<Tiles, Format>(rows, columns, values, scales, biases, problem.depth, shared, simd, lane);
    if (int(lane) < mine) {
      const int i = first_slot + int(lane);
      const int label = id(columns, i);
      if (label >= 0) {
        state.label_logit = logit_of(problem, head_bias, head_offset, shared[i * Tiles::PITCH_Z + i], label);
      }
    }
  }

  const int begin = int(group.y) * problem.ids_per_split;
  const int end = min(begin + problem.ids_per_split, problem.vocab);
  for (int base = begin; base < end; base += Tiles::BN) {
    PlainColumns columns;
    columns.first = base;
    columns.count = end;
    tile_product<Tiles, Format>(rows, columns, values, scales, biases, problem.depth, shared, simd, lane);
    for (int step = 0; step < Tiles::BN; step += LANES) {
      const int column = step + int(lane);
      const bool counts = base + column < end;
      RunningSoftmax seen_of_mine = no_softmax();
      RunningComparison compared_of_mine = no_comparison();
      METALENS_UNROLL
      for (int i = 0; i < mine; ++i) {
        const int partner = simd_shuffle(my_partner, ushort(i));
        if (partner < 0) {
          continue;  // all lanes skip this row
        }
        const float z =
            counts ? logit_of(problem, head_bias, head_offset, shared[(first_slot + i) * Tiles::PITCH_Z + column], base + column) : -INFINITY;
        RunningSoftmax seen = softmax_of(z, max(simd_max(z), LOWEST));
        seen.sum = simd_sum(seen.sum);
        seen.weighted = simd_sum(seen.weighted);
        RunningComparison compared = no_comparison();
        if (partner != first_slot + i) {
          const float z_model =
              counts ? logit_of(problem, head_bias, head_offset, shared[partner * Tiles::PITCH_Z + column], base + column) : -INFINITY;
          const float top = max(simd_max(z_model), LOWEST);
          if (counts) {
            compared = comparison_of(z, z_model, top);
          }
          compared.top = top;
          compared.sum = simd_sum(compared.sum);
          compared.mean = simd_sum(compared.mean);
          compared.raise = simd_sum(compared.raise);
        }
        const float label_logit = simd_shuffle(state.label_logit, ushort(i));  // in all lanes, so not behind `counts &&`
        const int higher = simd_sum(counts && z > label_logit ? 1 : 0);
        if (int(lane) == i) {
          seen_of_mine = seen;
          compared_of_mine = compared;
          state.above += higher;
        }
        offer(top[i], z, counts ? base + column : NO_ID, problem.k, lane);
      }
      state.lens = merged(state.lens, seen_of_mine);
      state.model = merged(state.model, compared_of_mine);
    }
  }

  const long first = (long(group.y) * groups.x + block) * Tiles::BM + first_slot;
  if (int(lane) < mine) {
    write_state(state, states + (first + lane) * FIELDS, above + first + lane);
  }
  METALENS_UNROLL
  for (int i = 0; i < mine; ++i) {
    if (int(lane) < problem.k) {
      top_logits[(first + i) * problem.k + lane] = top[i].logit;
      top_ids[(first + i) * problem.k + lane] = top[i].id;
    }
  }
}

}  // namespace metalens
