// Common parts of the lens_stats kernels: which rows a threadgroup takes, and the state of a row.
//
// The rows of all tokens form one sequence: for each token the model's own row, if there is one, then its lens rows. Blocks divide the sequence. The
// model's row must lie in the same block as the lens rows that are compared with it: then one dequantized tile of U serves them all, and the
// comparison is exact for any head, with or without a softcap. If a block boundary divides the rows of a token, the next block starts with a repeat
// of the model's row:
//
//   sequence   n*0 n00 n10 n20 | n*1 n01 n11 n21 | n*2 ...            three layers; n21 is layer 2 of token 1
//   blocks     [ n*0 | n*0 n00 n10 n20 n*1 n01 n11 ]  [ n*1 | n21 n*2 ... ]      eight slots, the first of them for the repeated row
//
// So a block of B slots holds B - 1 rows of the sequence, or B rows if there is only one block and nothing to repeat.
#pragma once

#include "head.h"
#include "softmax.h"
#include "top.h"

namespace metalens {

struct StatsProblem {
  int layers;         // L
  int tokens;         // N; without a model all L N rows count as tokens of one layer
  int depth;          // D
  int vocab;          // ids below it are tokens
  int repeat_slots;   // slots at the start of a block for a repeated row of the model: 0 or 1
  int ids_per_split;  // whole tiles or, for lens_stats_vector, whole steps
  int k;
  int with_model;
  int labels;        // labels of a token; 0: there are none
  int label_tokens;  // token t has the labels of token t mod label_tokens
  int with_bias;
  int with_offset;
  int block_rows;  // slots of a block
  int blocks;
  int splits;
  float scale;
  float softcap;  // 0: none
};

METAL_FUNC const device StatsProblem& stats_problem(const device int* words) {
  return *reinterpret_cast<const device StatsProblem*>(words);
}

// Floats in the state of a row, which every split writes.
constexpr constant int FIELDS = 8;

// A row of the sequence, and the slots of its block that belong to it.
struct Slot {
  int token;
  int layer;  // -1: the model's own row
  int model;  // the slot of the model's row, if there is a model
  bool used;
};

METAL_FUNC Slot slot_at(const device StatsProblem& problem, int block, int i) {
  const int of_token = problem.layers + problem.with_model;
  const int first = block * (problem.block_rows - problem.repeat_slots);  // the block's first row in the sequence
  const int position = first + max(i - problem.repeat_slots, 0);
  Slot slot;
  slot.token = position / of_token;
  slot.layer = position % of_token - problem.with_model;
  slot.model = max(i - position % of_token, 0);
  slot.used = slot.token < problem.tokens;
  if (i < problem.repeat_slots) {
    slot.layer = -1;
    slot.model = i;
  }
  return slot;
}

// The slot of a row of the sequence, counted over all blocks.
METAL_FUNC long slot_of(const device StatsProblem& problem, int token, int of_token) {
  const int position = token * (problem.layers + problem.with_model) + of_token;
  const int room = problem.block_rows - problem.repeat_slots;
  return long(position / room) * problem.block_rows + problem.repeat_slots + position % room;
}

// Label number `which` of a token, or -1 if it is not a token of the vocabulary. labels: [label_tokens, problem.labels].
METAL_FUNC int label_of(const device StatsProblem& problem, const device int* labels, int token, int which) {
  const int label = labels[token % problem.label_tokens * problem.labels + which];
  return label >= 0 && label < problem.vocab ? label : -1;
}

template <typename T>
METAL_FUNC const device T* row_at(const device StatsProblem& problem, const device T* n, const device T* n_model, Slot slot) {
  if (!slot.used) {
    return nullptr;
  }
  return slot.layer < 0 ? n_model + long(slot.token) * problem.depth : n + (long(slot.layer) * problem.tokens + slot.token) * problem.depth;
}

METAL_FUNC float logit_of(const device StatsProblem& problem, const device float* bias, const device float* offset, float product, int id) {
  if (id >= problem.vocab) {
    return -INFINITY;
  }
  const float biased = problem.with_bias != 0 ? product + bias[id] : product;
  const float capped = softcapped(biased * problem.scale, problem.softcap);
  return problem.with_offset != 0 ? capped + offset[id] : capped;
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
METAL_FUNC LensRows<T> lens_rows(const device StatsProblem& problem, const device T* n, const device T* n_model, int block) {
  LensRows<T> rows;
  rows.problem = &problem;
  rows.n = n;
  rows.n_model = n_model;
  rows.block = block;
  return rows;
}

template <typename T>
METAL_FUNC const device T* row(thread const LensRows<T>& rows, int i) {
  return row_at(*rows.problem, rows.n, rows.n_model, slot_at(*rows.problem, rows.block, i));
}

// The state of one row, apart from its top k.
struct RowState {
  RunningSoftmax lens;
  RunningComparison model;
};

METAL_FUNC RowState no_state() {
  RowState none;
  none.lens = no_softmax();
  none.model = no_comparison();
  return none;
}

// Merge the states of the lanes whose numbers differ only in the bits from `first` to below `last`.
template <ushort first, ushort last>
METAL_FUNC RowState simd_merged(RowState mine) {
  RowState all;
  all.lens = simd_merged<first, last>(mine.lens);
  all.model = simd_merged<first, last>(mine.model);
  return all;
}

METAL_FUNC void write_state(RowState state, device float* fields) {
  fields[0] = state.lens.top;
  fields[1] = state.lens.sum;
  fields[2] = state.lens.weighted;
  fields[3] = state.lens.reverse;
  fields[4] = state.model.top;
  fields[5] = state.model.sum;
  fields[6] = state.model.mean;
  fields[7] = state.model.raise;
}

METAL_FUNC RowState read_state(const device float* fields) {
  RowState state;
  state.lens.top = fields[0];
  state.lens.sum = fields[1];
  state.lens.weighted = fields[2];
  state.lens.reverse = fields[3];
  state.model.top = fields[4];
  state.model.sum = fields[5];
  state.model.mean = fields[6];
  state.model.raise = fields[7];
  return state;
}

}  // namespace metalens
