// What the kernels behind lens_stats share: which rows a threadgroup takes, and what is kept of each.
//
// With a model, the model's own row of a token lies in the same block as the lens rows that are compared with it, so that one dequantised tile of U
// serves them all and any head is compared exactly, softcap or not:
//
//   block = | n* t0 | lens rows of t0: layers l .. l + layers_per_block | n* t1 | lens rows of t1 | ...
#pragma once

#include "head.h"
#include "softmax.h"
#include "top.h"

namespace metalens {

struct StatsProblem {
  int layers;            // L
  int tokens;            // N; without a model all L N rows count as tokens of one layer
  int depth;             // D
  int vocab;             // ids below it are tokens
  int layers_per_block;  // lens rows of one token in a block
  int share;             // ids per split: a whole number of tiles (of steps, for few rows)
  int k;
  int with_model;
  int label_tokens;  // token t has label t mod label_tokens; 0: there are no labels
  int with_bias;
  int block_rows;  // slots of a block
  int blocks;
  int splits;
  float scale;
  float softcap;  // 0: none
};

// What a split leaves behind of one row.
constexpr constant int FIELDS = 8;

// Where a slot of a block lies.
struct Slot {
  int token;
  int layer;   // -1: the model's own row
  int model;   // the slot of the model's row
  bool used;
};

METAL_FUNC Slot slot_at(const device StatsProblem& problem, int block, int i) {
  const int stride = problem.layers_per_block + problem.with_model;
  const int chunks = (problem.layers + problem.layers_per_block - 1) / problem.layers_per_block;
  const int tokens_per_block = problem.block_rows / stride;
  Slot slot;
  slot.token = block / chunks * tokens_per_block + i / stride;
  slot.model = i / stride * stride;
  const bool is_model = problem.with_model != 0 && i == slot.model;
  slot.layer = is_model ? -1 : block % chunks * problem.layers_per_block + i % stride - problem.with_model;
  slot.used = i / stride < tokens_per_block && slot.token < problem.tokens && slot.layer < problem.layers;
  return slot;
}

METAL_FUNC int label_at(const device StatsProblem& problem, const device int* labels, Slot slot) {
  if (problem.label_tokens == 0 || !slot.used) {
    return -1;
  }
  const int label = labels[slot.token % problem.label_tokens];
  return label >= 0 && label < problem.vocab ? label : -1;
}

template <typename T>
METAL_FUNC const device T* row_at(const device StatsProblem& problem, const device T* n, const device T* n_model, Slot slot) {
  if (!slot.used) {
    return nullptr;
  }
  return slot.layer < 0 ? n_model + long(slot.token) * problem.depth : n + (long(slot.layer) * problem.tokens + slot.token) * problem.depth;
}

METAL_FUNC float logit_of(const device StatsProblem& problem, const device float* bias, float product, int id) {
  if (id >= problem.vocab) {
    return -INFINITY;
  }
  const float biased = problem.with_bias != 0 ? product + bias[id] : product;
  return softcapped(biased * problem.scale, problem.softcap);
}

template <typename T>
struct LensRows {
  using Element = T;
  const device StatsProblem* problem;
  const device T* n;
  const device T* n_model;
  int block;
};

template <typename T>
METAL_FUNC const device T* row(thread const LensRows<T>& rows, int i) {
  return row_at(*rows.problem, rows.n, rows.n_model, slot_at(*rows.problem, rows.block, i));
}

struct LabelColumns {
  const device StatsProblem* problem;
  const device int* labels;
  int block;
};

METAL_FUNC int id(thread const LabelColumns& columns, int j) {
  return j < columns.problem->block_rows ? label_at(*columns.problem, columns.labels, slot_at(*columns.problem, columns.block, j)) : -1;
}

// What is kept of one row, besides its top k.
struct RowState {
  RunningSoftmax lens;
  RunningComparison model;
  float label_logit;
  int above;  // tokens above the label
};

METAL_FUNC RowState no_state() {
  RowState none;
  none.lens = no_softmax();
  none.model = no_comparison();
  none.label_logit = NAN;
  none.above = 0;
  return none;
}

METAL_FUNC void write_state(RowState state, device float* fields, device int* above) {
  fields[0] = state.lens.top;
  fields[1] = state.lens.sum;
  fields[2] = state.lens.weighted;
  fields[3] = state.model.top;
  fields[4] = state.model.sum;
  fields[5] = state.model.mean;
  fields[6] = state.model.raise;
  fields[7] = state.label_logit;
  *above = state.above;
}

METAL_FUNC RowState read_state(const device float* fields, int above) {
  RowState state;
  state.lens.top = fields[0];
  state.lens.sum = fields[1];
  state.lens.weighted = fields[2];
  state.model.top = fields[3];
  state.model.sum = fields[4];
  state.model.mean = fields[5];
  state.model.raise = fields[6];
  state.label_logit = fields[7];
  state.above = above;
  return state;
}

}  // namespace metalens
