// From a tile of products in threadgroup memory to the states of its rows: the common end of lens_stats and lens_stats_vector.
//
// A simdgroup reads its rows, and each lane reads one of them in some of the tile's columns. It keeps their running softmax, their comparison with
// the model, and the number of tokens above the label, without any exchange with other lanes: the lanes of a row merge these once, at the end of the
// split. The row's top k lie in the results' own memory. A simdgroup loads them into its lanes only if some logit enters them.
#pragma once

#include "stats_rows.h"
#include "tile.h"

namespace metalens {

// What a lane reads of every tile. ROWS: rows of a simdgroup.
template <int ROWS>
struct RowReader {
  // Lanes of a row; each takes every PARTS-th column.
  static constexpr constant int PARTS = ROWS > 8 ? 2 : ROWS > 4 ? 4 : ROWS > 2 ? 8 : 16;
  static constexpr constant int ROW_LANES = LANES / PARTS;
  static_assert(ROWS <= ROW_LANES, "each row has its lanes");
  int index;   // of the lane's row among the simdgroup's
  int slot;    // the row's place in the tile
  int model;   // the place of the row that it is compared with, or -1
  int column;  // the lane's first column
  bool reads;  // whether there is such a row
};

// The lane reads the row at `first_slot + index` of the block, whose place in the tile has the same number.
template <int ROWS>
METAL_FUNC RowReader<ROWS> row_reader(const device StatsProblem& problem, int block, int first_slot, uint lane) {
  RowReader<ROWS> reader;
  reader.index = int(lane) % RowReader<ROWS>::ROW_LANES;
  reader.slot = first_slot + min(reader.index, ROWS - 1);
  const Slot slot = slot_at(problem, block, reader.slot);
  reader.model = problem.with_model != 0 && slot.model != reader.slot ? slot.model : -1;
  // With this first column and the pitch of Z, the lanes read 32 different banks.
  reader.column = int(lane) / RowReader<ROWS>::ROW_LANES + (RowReader<ROWS>::PARTS + TILE_IDS - PITCH_Z % LANES) * reader.index;
  reader.reads = reader.index < ROWS && slot.used;
  return reader;
}

// The state of the lane's row, as far as this lane has read it.
struct LaneState {
  RowState row;
  TopList last;  // the last entry of the row's list, the same in all lanes of the row
};

// The lists of rows `first` to `first + ROWS - 1` of [rows, k] are cleared.
template <int ROWS>
METAL_FUNC LaneState first_state(const device StatsProblem& problem, device float* top_logits, device int* top_ids, long first, uint lane) {
  LaneState state;
  state.row = no_state();
  state.last = empty_list();
  for (int i = 0; i < ROWS; ++i) {
    write_list(state.last, top_logits, top_ids, first + i, problem.k, lane);
  }
  return state;
}

template <int ROWS>
METAL_FUNC void read_tile(
    const device StatsProblem& problem,
    const device float* head_bias,
    const device float* head_offset,
    const threadgroup float* z,  // [slots, PITCH_Z] products of the ids from `base` on
    int base,
    int end,
    thread const RowReader<ROWS>& reader,
    thread LaneState& state,
    device float* top_logits,
    device int* top_ids,
    long first,
    uint lane) {
  bool enters = false;
  if (reader.reads) {
    METALENS_ROLLED
    for (int j = 0; j < TILE_IDS; j += RowReader<ROWS>::PARTS) {
      const int column = (reader.column + j) % TILE_IDS;
      const int id = base + column;
      if (id < end) {
        const float logit = logit_of(problem, head_bias, head_offset, z[reader.slot * PITCH_Z + column], id);
        add(state.row.lens, logit);
        if (reader.model >= 0) {
          add(state.row.model, logit, logit_of(problem, head_bias, head_offset, z[reader.model * PITCH_Z + column], id));
        }
        state.row.above += logit > state.row.label_logit ? 1 : 0;
        enters = enters || precedes(logit, id, state.last.logit, state.last.id);
      }
    }
  }
  // The rows whose lists change, a bit each: the same in all lanes.
  for (uint changing = simd_or(enters ? 1u << reader.index : 0u); changing != 0; changing &= changing - 1) {
    const int i = int(ctz(changing));
    const int slot = simd_broadcast(reader.slot, ushort(i));  // lane i reads row i
    TopList list = read_list(top_logits, top_ids, first + i, problem.k, lane);
    METALENS_ROLLED
    for (int column = int(lane); column < TILE_IDS; column += LANES) {
      const int id = base + column;
      const float logit = id < end ? logit_of(problem, head_bias, head_offset, z[slot * PITCH_Z + column], id) : -INFINITY;
      offer(list, logit, id < end ? id : NO_ID, problem.k, lane);
    }
    write_list(list, top_logits, top_ids, first + i, problem.k, lane);
    const TopList last = last_entry(list, problem.k);
    if (reader.index == i) {
      state.last = last;
    }
  }
}

// Merge the lanes of each row and write the states of rows `first` to `first + ROWS - 1`.
template <int ROWS>
METAL_FUNC void write_states(thread const LaneState& state, device float* states, device int* above, long first, uint lane) {
  const RowState row = simd_merged<RowReader<ROWS>::ROW_LANES, LANES>(state.row);
  if (int(lane) < ROWS) {
    write_state(row, states + (first + lane) * FIELDS, above + first + lane);
  }
}

}  // namespace metalens
