// lens_stats: the product U n and all statistics of its logits in one kernel. No logit is written.
//
// A threadgroup computes a block of rows over one split of the vocabulary, a tile of BN ids at a time. After each product every simdgroup reads its
// quarter of the tile's rows into their states. lens_stats_merge then merges the splits.
#pragma once

#include "stats_tile.h"

namespace metalens {

template <typename T, typename Format, typename Tiles>
METAL_FUNC void lens_stats(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,     // [V], if there is one
    const device float* head_offset,   // [V], if there is one
    const device float* label_logits,  // [blocks, BM, labels], if there are labels
    const device int* problem_words,
    device float* states,      // [splits, blocks, BM, FIELDS]
    device int* above,         // [splits, blocks, BM, labels]
    device float* top_logits,  // [splits, blocks, BM, k]
    device int* top_ids,       // [splits, blocks, BM, k]
    threadgroup float* shared,
    uint3 group,
    uint3 groups,
    uint simd,
    uint lane) {
  constexpr int mine = Tiles::BM / SIMDS;  // rows of a simdgroup
  static_assert(Tiles::BM % SIMDS == 0, "each simdgroup reads a quarter of the rows");
  const device StatsProblem& problem = stats_problem(problem_words);
  const int block = int(group.x);
  const int first_slot = int(simd) * mine;
  const long first = (long(group.y) * groups.x + block) * Tiles::BM + first_slot;  // the simdgroup's first row in the results
  const RowMemory memory = row_memory(problem, block, first_slot, first, label_logits, above, top_logits, top_ids);
  const RowReader<mine> reader = row_reader<mine>(problem, block, first_slot, lane);
  LaneState state = first_state<mine>(problem, memory, lane);

  const int begin = int(group.y) * problem.ids_per_split;
  const int end = min(begin + problem.ids_per_split, problem.vocab);
  for (int base = begin; base < end; base += Tiles::BN) {
    const PlainColumns columns = plain_columns(base, end);
    block_product<Format>(Tiles(), problem, n, n_model, block, columns, values, scales, biases, shared, simd, lane);
    read_tile<mine>(problem, head_bias, head_offset, shared, base, end, reader, memory, state, lane);
  }
  write_states<mine>(state, states + first * FIELDS, lane);
}

}  // namespace metalens
