// lens_label_logits: the logits of each row's labels, for lens_stats, which counts the tokens above them while it reads the vocabulary.
//
// The columns of a tile are the labels of the block's rows, one of each, and the diagonal gives their logits: computed exactly as in the tiles of the
// vocabulary. It is a kernel of its own because the splits of the vocabulary would each have to compute that tile. Each label of a row has a
// threadgroup. lens_label_logits_vector does the same for lens_stats_vector: each label of the eight rows has a simdgroup.
#pragma once

#include "stats_tile.h"
#include "vector_product.h"

namespace metalens {

// Label number `which` of the row in slot i of the block, or -1.
struct LabelColumns {
  const device StatsProblem* problem;
  const device int* labels;
  int block;
  int which;
};

METAL_FUNC int id(thread const LabelColumns& columns, int j) {
  if (j >= columns.problem->block_rows) {
    return -1;
  }
  const Slot slot = slot_at(*columns.problem, columns.block, j);
  return slot.used ? label_of(*columns.problem, columns.labels, slot.token, columns.which) : -1;
}

METAL_FUNC LabelColumns label_columns(const device StatsProblem& problem, const device int* labels, int block, int which) {
  LabelColumns columns;
  columns.problem = &problem;
  columns.labels = labels;
  columns.block = block;
  columns.which = which;
  return columns;
}

// Write the logit of the label of the row in slot i, from its product; NaN for what is no token. label_logits: [blocks, block rows, labels].
METAL_FUNC void write_label_logit(
    thread const LabelColumns& columns,
    const device float* head_bias,
    const device float* head_offset,
    float product,
    int i,
    int label,
    device float* label_logits) {
  const device StatsProblem& problem = *columns.problem;
  const long row = long(columns.block) * problem.block_rows + i;
  label_logits[row * problem.labels + columns.which] = label >= 0 ? logit_of(problem, head_bias, head_offset, product, label) : NAN;
}

template <typename T, typename Format, typename Tiles>
METAL_FUNC void lens_label_logits(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,    // [V], if there is one
    const device float* head_offset,  // [V], if there is one
    const device int* labels,         // [label_tokens, labels]
    const device int* problem_words,
    device float* label_logits,  // [blocks, BM, labels], NaN for what is no token
    threadgroup float* shared,
    uint3 group,
    uint simd,
    uint lane) {
  static_assert(Tiles::BM <= Tiles::BN, "the labels of all rows fit one tile");
  const device StatsProblem& problem = stats_problem(problem_words);
  const int block = int(group.x);
  const LabelColumns columns = label_columns(problem, labels, block, int(group.y));
  block_product<Format>(Tiles(), problem, n, n_model, block, columns, values, scales, biases, shared, simd, lane);

  const int i = thread_index(simd, lane);
  if (i < Tiles::BM) {
    write_label_logit(columns, head_bias, head_offset, shared[i * PITCH_Z + i], i, id(columns, i), label_logits);
  }
}

template <typename T, typename Format>
METAL_FUNC void lens_label_logits_vector(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,    // [V], if there is one
    const device float* head_offset,  // [V], if there is one
    const device int* labels,         // [label_tokens, labels]
    const device int* problem_words,
    device float* label_logits,  // [blocks, VECTOR_ROWS, labels], NaN for what is no token
    threadgroup float* shared,   // VECTOR_X
    uint3 group,
    uint simd,
    uint lane) {
  const device StatsProblem& problem = stats_problem(problem_words);
  const int block = int(group.x);
  const int which = int(group.y) * VECTOR_SIMDS + int(simd);
  const int my_id = fragment_row(lane);  // of the matrix: the row whose label it is
  const bool works = which < problem.labels;
  const LabelColumns columns = label_columns(problem, labels, block, which);
  const int label = works ? id(columns, my_id) : -1;
  const device T* staged = staged_row(problem, n, n_model, block, simd, lane);
  float2 sums = float2(0.0f);
  for (int first = 0; first < problem.depth; first += VECTOR_STAGE) {
    stage_rows(staged, first, problem.depth, shared, simd, lane);
    if (works) {  // the same in all lanes
      sums = vector_products<Format>(sums, values, scales, biases, label, first, problem.depth, shared, lane);
    }
  }
  if (works && my_id / 2 * 2 == fragment_column(lane)) {  // the diagonal
    write_label_logit(columns, head_bias, head_offset, my_id % 2 == 0 ? sums.x : sums.y, my_id, label, label_logits);
  }
}

}  // namespace metalens
