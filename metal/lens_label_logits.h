// lens_label_logits: the logit of each row's label, for lens_stats, which counts the tokens above it while it reads the vocabulary.
//
// The columns of a tile are the labels of the block's rows, and the diagonal gives their logits: computed exactly as in the tiles of the vocabulary.
// It is a kernel of its own because the splits of the vocabulary would each have to compute that tile.
#pragma once

#include "stats_rows.h"
#include "tile.h"

namespace metalens {

template <typename T, typename Format, typename Tiles>
METAL_FUNC void lens_label_logits(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,    // [V], if there is one
    const device float* head_offset,  // [V], if there is one
    const device int* labels,         // [label_tokens]
    const device int* problem_words,
    device float* label_logits,  // [blocks, BM], NaN for a row without a label
    threadgroup float* shared,
    uint3 group,
    uint simd,
    uint lane) {
  static_assert(Tiles::BM <= Tiles::BN, "the labels of all rows fit one tile");
  const device StatsProblem& problem = *reinterpret_cast<const device StatsProblem*>(problem_words);
  LensRows<T> rows;
  rows.problem = &problem;
  rows.n = n;
  rows.n_model = n_model;
  rows.block = int(group.x);
  LabelColumns columns;
  columns.problem = &problem;
  columns.labels = labels;
  columns.block = int(group.x);
  tile_product<Tiles, Format>(rows, columns, values, scales, biases, problem.depth, shared, simd, lane);

  const int i = int(simd) * LANES + int(lane);
  if (i < Tiles::BM) {
    const int label = id(columns, i);
    const float product = shared[i * PITCH_Z + i];
    label_logits[rows.block * Tiles::BM + i] = label >= 0 ? logit_of(problem, head_bias, head_offset, product, label) : NAN;
  }
}

}  // namespace metalens
