// lens_stats_merge: merge the states of all splits of the vocabulary, in a fixed order, and write the results. Each lens row has a simdgroup.
#pragma once

#include "stats_rows.h"

namespace metalens {

// Merge the top lists of all splits of a row. Each list is sorted, so the first entry that does not enter the result ends its list.
METAL_FUNC TopList
merged_top(const device StatsProblem& problem, const device float* top_logits, const device int* top_ids, long row_of_split, int k, uint lane) {
  const long pitch = long(problem.blocks) * problem.block_rows;  // rows per split
  TopList list = empty_list();
  for (int first = 0; first < problem.splits; first += LANES) {
    const int split = first + int(lane);
    bool open = split < problem.splits;
    for (int index = 0; index < k; ++index) {
      const long entry = (split * pitch + row_of_split) * problem.k + index;
      const float logit = open ? top_logits[entry] : -INFINITY;
      const int id = open ? top_ids[entry] : NO_ID;
      const TopList last = last_entry(list, k);
      open = open && id != NO_ID && precedes(logit, id, last.logit, last.id);
      if (!simd_any(open)) {
        break;
      }
      offer(list, logit, open ? id : NO_ID, k, lane);
    }
  }
  return list;
}

METAL_FUNC void lens_stats_merge(
    const device float* states,        // [splits, blocks, block_rows, FIELDS]
    const device int* above,           // [splits, blocks, block_rows, labels]
    const device float* top_logits,    // [splits, blocks, block_rows, k]
    const device int* top_ids,         // [splits, blocks, block_rows, k]
    const device float* label_logits,  // [blocks, block_rows, labels]
    const device int* labels,          // [label_tokens, labels]
    const device int* problem_words,
    device float* out_lse,  // [L, N], as are all outputs without a shape here
    device float* out_entropy,
    device float* out_max_probability,
    device int* out_top_ids,       // [L, N, k]
    device float* out_top_logits,  // [L, N, k]
    device float* out_kl,
    device bool* out_agrees,
    device float* out_reverse_kl,
    device float* out_nll,  // [L, N, labels]
    device int* out_rank,   // [L, N, labels]
    uint3 group,
    uint simd,
    uint lane) {
  const device StatsProblem& problem = stats_problem(problem_words);
  const int out = int(group.x) * SIMDS + int(simd);
  if (out >= problem.layers * problem.tokens) {
    return;  // the whole simdgroup returns; the kernel has no barriers
  }
  const int layer = out / problem.tokens;
  const int token = out % problem.tokens;
  const long row = slot_of(problem, token, problem.with_model + layer);
  const long pitch = long(problem.blocks) * problem.block_rows;

  RowState state = no_state();
  for (int split = int(lane); split < problem.splits; split += LANES) {
    const long at = split * pitch + row;
    const RowState of_split = read_state(states + at * FIELDS);
    state.lens = merged(state.lens, of_split.lens);
    state.model = merged(state.model, of_split.model);
  }
  state.lens = simd_merged(state.lens);
  state.model = simd_merged(state.model);
  const TopList top = merged_top(problem, top_logits, top_ids, row, problem.k, lane);

  const float total = lse(state.lens);
  if (int(lane) < problem.k) {
    // A row with NaN has no top tokens; the ids written for it are valid tokens at least.
    out_top_ids[long(out) * problem.k + lane] = isnan(total) ? int(lane) : top.id;
    out_top_logits[long(out) * problem.k + lane] = isnan(total) ? NAN : top.logit;
  }
  const int best_of_model =
      problem.with_model != 0 ? simd_broadcast(merged_top(problem, top_logits, top_ids, slot_of(problem, token, 0), 1, lane).id, 0) : NO_ID;
  if (lane == 0) {
    out_lse[out] = total;
    out_entropy[out] = entropy(state.lens);
    out_max_probability[out] = isnan(total) ? NAN : precise::exp(top.logit - total);
    if (problem.with_model != 0) {
      out_kl[out] = kl_divergence(state.model, state.lens);
      out_reverse_kl[out] = reverse_kl_divergence(state.model, state.lens);
      out_agrees[out] = top.id == best_of_model && top.id != NO_ID;
    }
  }
  for (int i = 0; i < problem.labels; ++i) {
    int of_lane = 0;
    for (int split = int(lane); split < problem.splits; split += LANES) {
      of_lane += above[(split * pitch + row) * problem.labels + i];
    }
    const int in_all = simd_sum(of_lane);
    if (lane == 0) {
      const bool known = label_of(problem, labels, token, i) >= 0;
      out_nll[long(out) * problem.labels + i] = known ? total - label_logits[row * problem.labels + i] : NAN;
      out_rank[long(out) * problem.labels + i] = known ? 1 + in_all : -1;
    }
  }
}

}  // namespace metalens
