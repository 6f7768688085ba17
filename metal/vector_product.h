// The product of at most 8 rows X with U, for lens_stats_vector: Z^T [8 ids, 8 rows] = U [8 ids, D] X^T [D, 8 rows] in each simdgroup.
//
// clang-format off
//                    columns
//            +----------------------+      The threadgroup stages X in threadgroup memory, VECTOR_STAGE columns at a time, for all its simdgroups.
//     U   8  | 4 lanes x 32 columns |      The elements of U go from memory straight into the lanes' parts of the matrices: a lane loads the codes of
//            +----------------------+      32 columns of one id at once, whole words.
// clang-format on
//
// A lane holds two neighboring columns of each matrix of U, but loads 32. So the matrices do not take columns in order: matrix i of a step of 128
// columns holds columns 2 i and 2 i + 1 of each of the four lanes' spans. X is staged in that order.
#pragma once

#include "fragment.h"
#include "stats_rows.h"
#include "weight.h"

namespace metalens {

constexpr constant int VECTOR_ROWS = 8;
// Simdgroups of a threadgroup, and ids that must not be divided.
constexpr constant int VECTOR_SIMDS = 8;
constexpr constant int VECTOR_IDS = 8;
constexpr constant int VECTOR_THREADS = VECTOR_SIMDS * LANES;

// Columns of X that are staged at once, those that one load of a simdgroup covers in every id, and the floats of the staged X.
constexpr constant int VECTOR_STAGE = 512;
constexpr constant int VECTOR_STEP = 4 * SPAN;
constexpr constant int VECTOR_X = VECTOR_STAGE * VECTOR_ROWS;

// The row that a thread stages, or nullptr.
template <typename T>
METAL_FUNC const device T* staged_row(
    const device StatsProblem& problem, const device T* n, const device T* n_model, int block, uint simd, uint lane) {
  return row_at(problem, n, n_model, slot_at(problem, block, thread_index(simd, lane) % VECTOR_ROWS));
}

// Store columns `first` to `first + VECTOR_STAGE - 1` of X, zeros beyond its rows and columns, as matrices [8 columns, 8 rows] in the order in which
// the matrices of U take the columns. `row`: that of staged_row. After it any thread may read X.
template <typename T>
METAL_FUNC void stage_rows(const device T* row, int first, int depth, threadgroup float* shared, uint simd, uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // what lay in the memory has been read
  for (int u = thread_index(simd, lane); u < VECTOR_STAGE / 4 * VECTOR_ROWS; u += VECTOR_THREADS) {
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
  threadgroup_barrier(mem_flags::mem_threadgroup);
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

}  // namespace metalens
