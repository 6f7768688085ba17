// What the kernels behind lens_stats share: which rows a threadgroup takes, and what is kept of each.
//
// Rows come in a stream: of each token first the model's own row, if there is one, then its lens rows. Blocks cut the stream into pieces. The model's
// row must lie in the same block as the lens rows that are compared with it: one dequantized tile of U then serves them all, and any head is compared
// exactly, softcap or not. So where a cut goes through a token, the model's row is repeated at the start of the next block:
//
//   stream   n*0 n00 n10 n20 | n*1 n01 n11 n21 | n*2 ...            three layers; n21 is layer 2 of token 1
//   blocks   [ n*0 | n*0 n00 n10 n20 n*1 n01 n11 ]  [ n*1 | n21 n*2 ... ]      eight slots, the first of them reserved for a repeated row
//
// A block of B rows thus has room for B - 1 rows of the stream, or for B if there is only one block and nothing to repeat.
#pragma once

#include "head.h"
#include "softmax.h"
#include "top.h"

namespace metalens {

struct StatsProblem {
  int layers;    // L
  int tokens;    // N; without a model all L N rows count as tokens of one layer
  int depth;     // D
  int vocab;     // ids below it are tokens
  int reserved;  // slots at the start of a block for a repeated row of the model: 0 or 1
  int share;     // ids per split: a whole number of tiles (of steps, for few rows)
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

// A row's place: in the stream, and in its block.
struct Slot {
  int token;
  int layer;  // -1: the model's own row
  int model;  // the slot of the model's row, if there is a model
  bool used;
};

METAL_FUNC Slot slot_at(const device StatsProblem& problem, int block, int i) {
  const int of_token = problem.layers + problem.with_model;
  const int first = block * (problem.block_rows - problem.reserved);  // of the block, in the stream
  const int place = first + max(i - problem.reserved, 0);
  Slot slot;
  slot.token = place / of_token;
  slot.layer = place % of_token - problem.with_model;
  slot.model = max(i - place % of_token, 0);
  slot.used = slot.token < problem.tokens;
  if (i < problem.reserved) {
    slot.layer = -1;
    slot.model = i;
  }
  return slot;
}

// Where a row of the stream lies among the slots of all blocks.
METAL_FUNC long slot_of(const device StatsProblem& problem, int token, int of_token) {
  const int place = token * (problem.layers + problem.with_model) + of_token;
  const int room = problem.block_rows - problem.reserved;
  return long(place / room) * problem.block_rows + problem.reserved + place % room;
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
