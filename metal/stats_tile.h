// From a tile of products in threadgroup memory to the states of its rows: the common end of lens_stats and lens_stats_vector.
//
// A simdgroup reads its rows, and each lane reads one of them in some of the tile's columns. It keeps their running softmax and their comparison with
// the model without any exchange with other lanes: the lanes of a row merge these once, at the end of the split. The row's top k and the numbers of
// tokens above its labels lie in the results' own memory. A simdgroup loads the top k into its lanes only if some logit enters them.
#pragma once

#include "stats_rows.h"
#include "tile.h"

namespace metalens {

// Multiply the rows of a block with the ids of `columns` (tile_product): with those of a tile of the vocabulary, or with the rows' labels.
template <typename Format, typename Tiles, typename T, typename Columns>
METAL_FUNC void block_product(
    Tiles tiles,
    const device StatsProblem& problem,
    const device T* n,
    const device T* n_model,
    int block,
    Columns columns,
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    threadgroup float* shared,
    uint simd,
    uint lane) {
  tile_product<Format>(tiles, lens_rows(problem, n, n_model, block), columns, values, scales, biases, problem.depth, shared, simd, lane);
}

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

// The memory of a simdgroup's rows in a split. A lane reads only what it wrote itself, so no barrier is needed. The pointers are those of the kernel:
// it is one offset, not an address for each array, that a lane keeps in registers while it multiplies.
struct RowMemory {
  const device float* label_logits;  // [block rows, labels]; the split reads them only
  device int* above;                 // [split rows, labels] tokens above the label
  device float* top_logits;          // [split rows, k]
  device int* top_ids;               // [split rows, k]
  long block_row;                    // the simdgroup's first row among those of all blocks
  long split_row;                    // and among those of all splits
};

// The memory of the rows from slot `first_slot` of the block on. `split_row`: the first of them among the rows of all splits.
METAL_FUNC RowMemory row_memory(
    const device StatsProblem& problem,
    int block,
    int first_slot,
    long split_row,
    const device float* label_logits,
    device int* above,
    device float* top_logits,
    device int* top_ids) {
  RowMemory memory;
  memory.label_logits = label_logits;
  memory.above = above;
  memory.top_logits = top_logits;
  memory.top_ids = top_ids;
  memory.block_row = block * problem.block_rows + first_slot;
  memory.split_row = split_row;
  return memory;
}

// The state of the lane's row, as far as this lane has read it.
struct LaneState {
  RowState row;
  TopList last;  // the last entry of the row's list, the same in all lanes of the row
};

// The rows' lists and counts are cleared.
template <int ROWS>
METAL_FUNC LaneState first_state(const device StatsProblem& problem, thread const RowMemory& memory, uint lane) {
  LaneState state;
  state.row = no_state();
  state.last = empty_list();
  for (int i = 0; i < ROWS; ++i) {
    write_list(state.last, memory.top_logits, memory.top_ids, memory.split_row + i, problem.k, lane);
  }
  for (int i = 0; int(lane) < ROWS && i < problem.labels; ++i) {
    memory.above[(memory.split_row + lane) * problem.labels + i] = 0;
  }
  return state;
}

// Count the tile's tokens above each label. The logits are computed again: that costs less than a register for every label.
template <int ROWS>
METAL_FUNC void count_above(
    const device StatsProblem& problem,
    const device float* head_bias,
    const device float* head_offset,
    const threadgroup float* z,
    int base,
    int end,
    thread const RowReader<ROWS>& reader,
    thread const RowMemory& memory,
    uint lane) {
  for (int i = 0; i < problem.labels; ++i) {
    int above = 0;
    if (reader.reads) {
      const float label_logit = memory.label_logits[(memory.block_row + reader.index) * problem.labels + i];
      METALENS_ROLLED
      for (int j = 0; j < TILE_IDS; j += RowReader<ROWS>::PARTS) {
        const int column = (reader.column + j) % TILE_IDS;
        if (base + column < end) {
          above += logit_of(problem, head_bias, head_offset, z[reader.slot * PITCH_Z + column], base + column) > label_logit ? 1 : 0;
        }
      }
    }
    METALENS_UNROLL
    for (ushort step = RowReader<ROWS>::ROW_LANES; step < LANES; step *= 2) {
      above += simd_shuffle_xor(above, step);
    }
    if (int(lane) < ROWS) {  // lane i reads row i
      memory.above[(memory.split_row + lane) * problem.labels + i] += above;
    }
  }
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
    thread const RowMemory& memory,
    thread LaneState& state,
    uint lane) {
  bool enters = false;
  if (reader.reads) {
    METALENS_ROLLED
    for (int j = 0; j < TILE_IDS; j += RowReader<ROWS>::PARTS) {
      const int column = (reader.column + j) % TILE_IDS;
      const int id = base + column;
      if (id < end) {
        const float logit = logit_of(problem, head_bias, head_offset, z[reader.slot * PITCH_Z + column], id);
        float d = 0.0f;
        if (reader.model >= 0) {
          const float of_model = logit_of(problem, head_bias, head_offset, z[reader.model * PITCH_Z + column], id);
          add(state.row.model, logit, of_model);
          d = logit - of_model;
        }
        add(state.row.lens, logit, d);
        enters = enters || precedes(logit, id, state.last.logit, state.last.id);
      }
    }
  }
  count_above(problem, head_bias, head_offset, z, base, end, reader, memory, lane);
  // The rows whose lists change, a bit each: the same in all lanes.
  for (uint changing = simd_or(enters ? 1u << reader.index : 0u); changing != 0; changing &= changing - 1) {
    const int i = int(ctz(changing));
    const int slot = simd_broadcast(reader.slot, ushort(i));  // lane i reads row i
    TopList list = read_list(memory.top_logits, memory.top_ids, memory.split_row + i, problem.k, lane);
    METALENS_ROLLED
    for (int column = int(lane); column < TILE_IDS; column += LANES) {
      const int id = base + column;
      const float logit = id < end ? logit_of(problem, head_bias, head_offset, z[slot * PITCH_Z + column], id) : -INFINITY;
      offer(list, logit, id < end ? id : NO_ID, problem.k, lane);
    }
    write_list(list, memory.top_logits, memory.top_ids, memory.split_row + i, problem.k, lane);
    const TopList last = last_entry(list, problem.k);
    if (reader.index == i) {
      state.last = last;
    }
  }
}

// Merge the lanes of each row and write the states [ROWS, FIELDS].
template <int ROWS>
METAL_FUNC void write_states(thread const LaneState& state, device float* states, uint lane) {
  const RowState row = simd_merged<RowReader<ROWS>::ROW_LANES, LANES>(state.row);
  if (int(lane) < ROWS) {
    write_state(row, states + int(lane) * FIELDS);
  }
}

}  // namespace metalens
