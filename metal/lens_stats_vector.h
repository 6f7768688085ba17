// lens_stats_vector: lens_stats for a block of at most 8 rows, such as all layers of one or two tokens while a model generates. The time to read U
// once bounds its speed.
//
// Eight rows are one side of an 8 x 8 matrix (vector_product.h). Each simdgroup takes a split of the vocabulary of its own, VECTOR_PASS ids in a pass
// over the columns. The threadgroup stages the rows for all its simdgroups.
#pragma once

#include "stats_tile.h"
#include "vector_product.h"

namespace metalens {

// Ids of a simdgroup in one pass over the rows.
constexpr constant int VECTOR_PASS = 64;

// Floats of threadgroup memory: the staged X or, in its place, each simdgroup's logits.
constexpr constant int VECTOR_FLOATS = VECTOR_SIMDS * VECTOR_ROWS * PITCH_Z;
static_assert(VECTOR_X <= VECTOR_FLOATS, "the staged X fits");
static_assert(VECTOR_PASS == TILE_IDS, "a pass is a tile of one simdgroup");

template <typename T, typename Format>
METAL_FUNC void lens_stats_vector(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,     // [V], if there is one
    const device float* head_offset,   // [V], if there is one
    const device float* label_logits,  // [blocks, VECTOR_ROWS, labels], if there are labels
    const device int* problem_words,
    device float* states,      // [splits, blocks, VECTOR_ROWS, FIELDS]
    device int* above,         // [splits, blocks, VECTOR_ROWS, labels]
    device float* top_logits,  // [splits, blocks, VECTOR_ROWS, k]
    device int* top_ids,       // [splits, blocks, VECTOR_ROWS, k]
    threadgroup float* shared,
    uint3 group,
    uint3 groups,
    uint simd,
    uint lane) {
  constexpr int matrices = VECTOR_PASS / VECTOR_IDS;
  const device StatsProblem& problem = stats_problem(problem_words);
  const int block = int(group.x);
  const int split = int(group.y) * VECTOR_SIMDS + int(simd);
  const int my_id = fragment_row(lane);                               // of the ids of a matrix
  const int my_rows = fragment_column(lane);                          // and the next
  const long first = (long(split) * groups.x + block) * VECTOR_ROWS;  // the simdgroup's first row in the results
  const device T* staged = staged_row(problem, n, n_model, block, simd, lane);
  threadgroup float* z = shared + int(simd) * VECTOR_ROWS * PITCH_Z;

  const RowMemory memory = row_memory(problem, block, 0, first, label_logits, above, top_logits, top_ids);
  const RowReader<VECTOR_ROWS> reader = row_reader<VECTOR_ROWS>(problem, block, 0, lane);
  LaneState state = first_state<VECTOR_ROWS>(problem, memory, lane);
  const int begin = split * problem.ids_per_split;
  const int end = min(begin + problem.ids_per_split, problem.vocab);
  // All simdgroups take the same number of passes, because they stage X together.
  for (int pass = 0; pass < problem.ids_per_split; pass += VECTOR_PASS) {
    const int base = begin + pass;
    float2 sums[matrices];
    METALENS_UNROLL
    for (int j = 0; j < matrices; ++j) {
      sums[j] = float2(0.0f);
    }
    for (int column = 0; column < problem.depth; column += VECTOR_STAGE) {
      stage_rows(staged, column, problem.depth, shared, simd, lane);
      METALENS_ROLLED
      for (int j = 0; j < matrices; ++j) {
        float2 products = sums[0];
        if (base + j * VECTOR_IDS < end) {  // the same in all lanes
          const int of_vocab = base + j * VECTOR_IDS + my_id;
          const int id = of_vocab < end ? of_vocab : -1;
          products = vector_products<Format>(products, values, scales, biases, id, column, problem.depth, shared, lane);
        }
        // The sums rotate, so that one body serves all matrices: an array of registers takes no index known only at run time.
        METALENS_UNROLL
        for (int i = 0; i < matrices - 1; ++i) {
          sums[i] = sums[i + 1];
        }
        sums[matrices - 1] = products;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last stage has been read
    METALENS_UNROLL
    for (int j = 0; j < matrices; ++j) {
      z[my_rows * PITCH_Z + j * VECTOR_IDS + my_id] = sums[j].x;
      z[(my_rows + 1) * PITCH_Z + j * VECTOR_IDS + my_id] = sums[j].y;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    read_tile<VECTOR_ROWS>(problem, head_bias, head_offset, z, base, end, reader, memory, state, lane);
  }
  write_states<VECTOR_ROWS>(state, states + first * FIELDS, lane);
}

}  // namespace metalens
