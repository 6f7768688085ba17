// lens_stats_vector: lens_stats for a block of at most 8 rows, such as all layers of one or two tokens while a model generates. The time to read U
// once bounds its speed.
//
// With so few rows, a tile product would mostly multiply zeros. Here each simdgroup takes a split of the vocabulary of its own, four ids at a time.
// Its lanes divide the columns. Every lane multiplies the units of U that it dequantizes with all R rows in registers; the sums over the lanes are
// the logits. Then lane i * R + r continues with the logit of the i-th id and row r, so that four ids times eight rows keep all lanes busy with
// exponentials.
#pragma once

#include "stats_rows.h"
#include "tile.h"

namespace metalens {

// Ids of a step: they share one reading of the rows.
constexpr constant int IDS_PER_STEP = 4;

template <typename T, int R>
struct VectorRows {
  const device T* at[R];  // nullptr for no row
};

struct VectorIds {
  int at[IDS_PER_STEP];  // -1 for no id
};

// U[id i] . x[r] in lane i * R + r. All lanes must call it, with the same ids.
template <typename T, typename Format, int R>
METAL_FUNC float vector_products(
    thread const VectorRows<T, R>& x,
    thread const VectorIds& ids,
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    int depth,
    uint lane) {
  float sums[IDS_PER_STEP][R];
  METALENS_UNROLL
  for (int i = 0; i < IDS_PER_STEP; ++i) {
    METALENS_UNROLL
    for (int r = 0; r < R; ++r) {
      sums[i][r] = 0.0f;
    }
  }
  for (int column = int(lane) * UNIT; column < depth; column += LANES * UNIT) {
    float of_x[R][UNIT];
    METALENS_UNROLL
    for (int r = 0; r < R; ++r) {
      load_row_unit(x.at[r], column, depth, of_x[r]);
    }
    METALENS_UNROLL
    for (int i = 0; i < IDS_PER_STEP; ++i) {
      if (ids.at[i] >= 0) {
        float of_u[UNIT];
        Format::load(values, scales, biases, ids.at[i], column, depth, of_u);
        METALENS_UNROLL
        for (int r = 0; r < R; ++r) {
          METALENS_UNROLL
          for (int c = 0; c < UNIT; ++c) {
            sums[i][r] = fma(of_x[r][c], of_u[c], sums[i][r]);
          }
        }
      }
    }
  }
  float product = 0.0f;
  METALENS_UNROLL
  for (int i = 0; i < IDS_PER_STEP; ++i) {
    METALENS_UNROLL
    for (int r = 0; r < R; ++r) {
      const float sum = simd_sum(sums[i][r]);
      product = int(lane) == i * R + r ? sum : product;
    }
  }
  return product;
}

template <typename T, typename Format, int R>
METAL_FUNC void lens_stats_vector(
    const device T* n,        // [L, N, D]
    const device T* n_model,  // [N, D], if there is a model
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    const device float* head_bias,    // [V], if there is one
    const device float* head_offset,  // [V], if there is one
    const device int* labels,         // [label_tokens]
    const device int* problem_words,
    device float* states,      // [splits, blocks, R, FIELDS]
    device int* above,         // [splits, blocks, R]
    device float* top_logits,  // [splits, blocks, R, k]
    device int* top_ids,       // [splits, blocks, R, k]
    uint3 group,
    uint3 groups,
    uint simd,
    uint lane) {
  static_assert(R == 1 || R == 2 || R == 4 || R == 8, "R is a power of two, and R rows of the ids of a step fill at most one simdgroup");
  const device StatsProblem& problem = *reinterpret_cast<const device StatsProblem*>(problem_words);
  const int block = int(group.x);
  const int split = int(group.y) * SIMDS + int(simd);
  const int my_row = int(lane) % R;
  const int my_id = int(lane) / R;
  const Slot slot = slot_at(problem, block, my_row);

  VectorRows<T, R> x;
  METALENS_UNROLL
  for (int r = 0; r < R; ++r) {
    x.at[r] = row_at(problem, n, n_model, slot_at(problem, block, r));
  }

  RowState state = no_state();
  const int label = label_at(problem, labels, slot);
  if (problem.label_tokens != 0) {
    METALENS_UNROLL
    for (int first = 0; first < R; first += IDS_PER_STEP) {
      VectorIds ids;
      METALENS_UNROLL
      for (int i = 0; i < IDS_PER_STEP; ++i) {
        ids.at[i] = first + i < R ? label_at(problem, labels, slot_at(problem, block, first + i)) : -1;
      }
      const float product = vector_products<T, Format, R>(x, ids, values, scales, biases, problem.depth, lane);
      const float of_mine = simd_shuffle(product, ushort(my_row % IDS_PER_STEP * R + my_row));
      if (my_row / IDS_PER_STEP == first / IDS_PER_STEP && label >= 0) {
        state.label_logit = logit_of(problem, head_bias, head_offset, of_mine, label);
      }
    }
  }

  TopList top[R];
  METALENS_UNROLL
  for (int r = 0; r < R; ++r) {
    top[r] = empty_list();
  }
  const int begin = split * problem.ids_per_split;
  const int end = min(begin + problem.ids_per_split, problem.vocab);
  for (int base = begin; base < end; base += IDS_PER_STEP) {
    VectorIds ids;
    METALENS_UNROLL
    for (int i = 0; i < IDS_PER_STEP; ++i) {
      ids.at[i] = base + i < end ? base + i : -1;
    }
    const float product = vector_products<T, Format, R>(x, ids, values, scales, biases, problem.depth, lane);
    const bool counts = my_id < IDS_PER_STEP && base + my_id < end && slot.used;
    const float z = counts ? logit_of(problem, head_bias, head_offset, product, base + my_id) : -INFINITY;
    const float z_model = simd_shuffle(z, ushort(my_id % IDS_PER_STEP * R + slot.model));
    if (counts) {
      state.lens = merged(state.lens, softmax_of(z, max(z, LOWEST)));
      state.above += z > state.label_logit ? 1 : 0;
      if (problem.with_model != 0) {
        state.model = merged(state.model, comparison_of(z, z_model, max(z_model, LOWEST)));
      }
    }
    METALENS_UNROLL
    for (int r = 0; r < R; ++r) {
      offer(top[r], z, counts && my_row == r ? base + my_id : NO_ID, problem.k, lane);
    }
  }

  // Merge the IDS_PER_STEP lanes of each row into the first of them.
  state.lens = simd_merged<R, R * IDS_PER_STEP>(state.lens);
  state.model = simd_merged<R, R * IDS_PER_STEP>(state.model);
  METALENS_UNROLL
  for (ushort step = R; step < R * IDS_PER_STEP; step *= 2) {
    state.above += simd_shuffle_xor(state.above, step);
  }

  const long first = (long(split) * groups.x + block) * R;
  if (int(lane) < R) {
    write_state(state, states + (first + lane) * FIELDS, above + first + lane);
  }
  METALENS_UNROLL
  for (int r = 0; r < R; ++r) {
    if (int(lane) < problem.k) {
      top_logits[(first + r) * problem.k + lane] = top[r].logit;
      top_ids[(first + r) * problem.k + lane] = top[r].id;
    }
  }
}

}  // namespace metalens
