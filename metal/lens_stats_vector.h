// lens_stats_vector: lens_stats for a block of at most 8 rows, such as all layers of one or two tokens while a model generates. The time to read U
// once bounds its speed.
//
// Eight rows are one side of an 8 x 8 matrix. Each simdgroup takes a split of the vocabulary of its own, 64 ids in a pass over the columns:
//
// clang-format off
//                    columns
//            +----------------------+      Z^T [64 ids, 8 rows] = U [64 ids, D] X^T [D, 8 rows]. The threadgroup stages X in threadgroup memory,
//     U  64  | 8 ids at a time:     |      STAGE columns at a time, for all its simdgroups. The elements of U go from memory straight into the
//            | 4 lanes x 32 columns |      lanes' parts of the matrices: a lane loads the codes of 32 columns of one id at once, whole words.
//            +----------------------+
// clang-format on
//
// A lane holds two neighboring columns of each matrix of U, but loads 32. So the matrices do not take columns in order: matrix i of a step of 128
// columns holds columns 2 i and 2 i + 1 of each of the four lanes' spans. X is staged in that order.
#pragma once

#include "fragment.h"
#include "stats_tile.h"

namespace metalens {

constexpr constant int VECTOR_ROWS = 8;
// Simdgroups of a threadgroup, ids that must not be divided, and ids of a simdgroup in one pass over X.
constexpr constant int VECTOR_SIMDS = 8;
constexpr constant int VECTOR_IDS = 8;
constexpr constant int VECTOR_PASS = 64;
constexpr constant int VECTOR_THREADS = VECTOR_SIMDS * LANES;

// Columns of X that are staged at once, and those that one load of a simdgroup covers in every id.
constexpr constant int VECTOR_STAGE = 512;
constexpr constant int VECTOR_STEP = 4 * SPAN;

// Floats of threadgroup memory: the staged X or, in its place, each simdgroup's logits; then the logits of the rows' labels.
constexpr constant int VECTOR_LOGITS = VECTOR_SIMDS * VECTOR_ROWS * PITCH_Z;
constexpr constant int VECTOR_FLOATS = VECTOR_LOGITS + VECTOR_ROWS;
static_assert(VECTOR_STAGE * VECTOR_ROWS <= VECTOR_LOGITS, "the staged X fits");
static_assert(VECTOR_PASS == TILE_IDS, "a pass is a tile of one simdgroup");

// Store columns `first` to `first + VECTOR_STAGE - 1` of X, zeros beyond its rows and columns, as matrices [8 columns, 8 rows] in the order in which
// the matrices of U take the columns. `row`: row `me % VECTOR_ROWS`, or nullptr.
template <typename T>
METAL_FUNC void stage_rows(const device T* row, int first, int depth, threadgroup float* shared, int me) {
  for (int u = me; u < VECTOR_STAGE / 4 * VECTOR_ROWS; u += VECTOR_THREADS) {
    const int r = u % VECTOR_ROWS;
    const int part = u / VECTOR_ROWS;  // four columns: neighboring parts lie in different spans
    const int step = part / (VECTOR_STEP / 4);
    const int span = part % 4;
    const int in_span = part % (VECTOR_STEP / 4) / 4 * 4;  // the first of the columns
    const float4 four = load_four(row, first + step * VECTOR_STEP + span * SPAN + in_span, row != nullptr ? depth : 0);
    threadgroup float* matrix = shared + ((step * SPAN + in_span) / 2 * 8 + 2 * span) * VECTOR_ROWS + r;
    // The upper two spans store their odd columns first, so that the lanes' stores hit 32 different banks.
    const int odd = span / 2;
    matrix[odd * VECTOR_ROWS] = odd ? four.y : four.x;
    matrix[(1 - odd) * VECTOR_ROWS] = odd ? four.x : four.y;
    matrix[(8 + odd) * VECTOR_ROWS] = odd ? four.w : four.z;
    matrix[(9 - odd) * VECTOR_ROWS] = odd ? four.z : four.w;
  }
}

// sums [8 ids, 8 rows] += U X^T over the staged columns. `id`: the row of U of this lane's row of the matrices, or -1.
template <typename Format>
METAL_FUNC float2 vector_products(
    float2 sums,
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    int id,
    int first,
    int depth,
    const threadgroup float* shared,
    uint lane) {
  simdgroup_matrix<float, 8, 8> products = fragment(sums);
  METALENS_ROLLED
  for (int step = 0; step < VECTOR_STAGE && first + step < depth; step += VECTOR_STEP) {
    const int column = first + step + fragment_column(lane) / 2 * SPAN;
    typename Format::Span span = Format::nothing();
    if (id >= 0 && column < depth) {
      span = Format::read(values, scales, biases, id, column, depth);
    }
    METALENS_UNROLL
    for (int u = 0; u < SPAN / UNIT; ++u) {
      float unit[UNIT];
      Format::unpack(span, u, unit);
      METALENS_UNROLL
      for (int i = 0; i < UNIT; i += 2) {
        simdgroup_matrix<float, 8, 8> rows;
        simdgroup_load(rows, shared + (step / 4 + u * UNIT + i) / 2 * 8 * VECTOR_ROWS, VECTOR_ROWS);
        simdgroup_matrix<float, 8, 8> ids = fragment(float2(unit[i], unit[i + 1]));
        simdgroup_multiply_accumulate(products, ids, rows, products);
      }
    }
  }
  return elements(products);
}

template <typename T, typename Format>
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
    device float* states,      // [splits, blocks, VECTOR_ROWS, FIELDS]
    device int* above,         // [splits, blocks, VECTOR_ROWS]
    device float* top_logits,  // [splits, blocks, VECTOR_ROWS, k]
    device int* top_ids,       // [splits, blocks, VECTOR_ROWS, k]
    threadgroup float* shared,
    uint3 group,
    uint3 groups,
    uint simd,
    uint lane) {
  constexpr int matrices = VECTOR_PASS / VECTOR_IDS;
  const device StatsProblem& problem = *reinterpret_cast<const device StatsProblem*>(problem_words);
  const int block = int(group.x);
  const int split = int(group.y) * VECTOR_SIMDS + int(simd);
  const int me = int(simd) * LANES + int(lane);
  const int my_id = fragment_row(lane);       // of the ids of a matrix
  const int my_rows = fragment_column(lane);  // and the next
  const long first_row = (long(split) * groups.x + block) * VECTOR_ROWS;
  const device T* staged = row_at(problem, n, n_model, slot_at(problem, block, me % VECTOR_ROWS));
  threadgroup float* z = shared + int(simd) * VECTOR_ROWS * PITCH_Z;
  threadgroup float* label_logits = shared + VECTOR_LOGITS;

  const RowReader<VECTOR_ROWS> reader = row_reader<VECTOR_ROWS>(problem, block, 0, lane);
  LaneState state = first_state<VECTOR_ROWS>(problem, top_logits, top_ids, first_row, lane);
  // Simdgroup 0 multiplies one more matrix in its first pass: the rows of U for the labels. Its diagonal gives their logits, computed exactly as
  // those of the vocabulary.
  const int label = simd == 0 ? label_at(problem, labels, slot_at(problem, block, my_id)) : -1;
  const int begin = split * problem.ids_per_split;
  const int end = min(begin + problem.ids_per_split, problem.vocab);
  // All simdgroups take the same number of passes, because they stage X together.
  for (int pass = 0; pass < problem.ids_per_split; pass += VECTOR_PASS) {
    const int base = begin + pass;
    const bool with_labels = pass == 0 && problem.label_tokens != 0;
    float2 sums[matrices + 1];
    METALENS_UNROLL
    for (int j = 0; j <= matrices; ++j) {
      sums[j] = float2(0.0f);
    }
    for (int first = 0; first < problem.depth; first += VECTOR_STAGE) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last stage, or the last pass's logits, have been read
      stage_rows(staged, first, problem.depth, shared, me);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      METALENS_ROLLED
      for (int j = 0; j <= matrices; ++j) {
        const bool is_label = j == matrices;
        float2 products = sums[0];
        if (is_label ? with_labels && simd == 0 : base + j * VECTOR_IDS < end) {  // the same in all lanes
          const int of_vocab = base + j * VECTOR_IDS + my_id;
          const int id = is_label ? label : of_vocab < end ? of_vocab : -1;
          products = vector_products<Format>(products, values, scales, biases, id, first, problem.depth, shared, lane);
        }
        // The sums rotate, so that one body serves all matrices: an array of registers takes no index known only at run time.
        METALENS_UNROLL
        for (int i = 0; i < matrices; ++i) {
          sums[i] = sums[i + 1];
        }
        sums[matrices] = products;
      }
    }
    if (with_labels && simd == 0 && my_id / 2 * 2 == my_rows) {
      const float product = my_id % 2 == 0 ? sums[matrices].x : sums[matrices].y;
      label_logits[my_id] = label >= 0 ? logit_of(problem, head_bias, head_offset, product, label) : NAN;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last stage has been read, and the labels' logits are there
    if (with_labels) {
      state.row.label_logit = label_logits[reader.slot];
    }
    METALENS_UNROLL
    for (int j = 0; j < matrices; ++j) {
      z[my_rows * PITCH_Z + j * VECTOR_IDS + my_id] = sums[j].x;
      z[(my_rows + 1) * PITCH_Z + j * VECTOR_IDS + my_id] = sums[j].y;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    read_tile<VECTOR_ROWS>(problem, head_bias, head_offset, z, base, end, reader, state, top_logits, top_ids, first_row, lane);
  }
  write_states<VECTOR_ROWS>(state, states, above, first_row, lane);
}

}  // namespace metalens
