// The tile product that the kernels are built on: Z [BM, BN] = X [BM, D] W [BN, D]^T, in threadgroup memory.
//
//                     BK
//            W  +-----------+        128 threads read BM rows of X and BN rows of W, BK columns at a time, widen or dequantize them to Operand, and
//               |    BN     |        put them side by side in threadgroup memory. Each of the 4 simdgroups then multiplies all BM rows with its own
//               +-----------+        BN / 4 rows of W, in 8 x 8 matrices that accumulate in float32. At the end Z takes the operands' place in
//   X +-----+   +-----------+        memory, where any thread may read any logit.
//     | BM  |   |     Z     |
//     +-----+   +-----------+        All simdgroups along W, none along X: BM can be any multiple of 8, and for each matrix of W a simdgroup loads,
//       BK                           BM / 8 products follow.
#pragma once

#include "weight.h"

namespace metalens {

// The width of a tile of Z (ids, if W is the head), and the columns of X and W that a step multiplies.
constexpr constant int TILE_IDS = 64;
constexpr constant int TILE_DEPTH = 32;
// Floats of a row of Z in threadgroup memory: a multiple of 16 bytes, with which the elements of a column lie in different banks.
constexpr constant int PITCH_Z = TILE_IDS + 4;

template <int BM_, typename Operand_>
struct Tile {
  using Operand = Operand_;
  static constexpr constant int BM = BM_;
  static constexpr constant int BN = TILE_IDS;
  static constexpr constant int BK = TILE_DEPTH;
  // A row has 16 spare bytes, so that eight rows' 16 bytes from the same column on fill the 32 banks of threadgroup memory.
  static constexpr constant int PITCH = BK + 16 / int(sizeof(Operand));
  // Matrices per simdgroup.
  static constexpr constant int ROWS = BM / 8;
  static constexpr constant int COLUMNS = BN / (8 * SIMDS);
  // Floats of threadgroup memory: the operands, or Z in their place.
  static constexpr constant int OPERANDS = (BM + BN) * PITCH * int(sizeof(Operand)) / 4;
  static constexpr constant int FLOATS = OPERANDS > BM* PITCH_Z ? OPERANDS : BM* PITCH_Z;
  static_assert(BM % 8 == 0 && BN % (8 * SIMDS) == 0 && BK % UNIT == 0, "tiles are made of 8 x 8 matrices, a whole number for each simdgroup");
};

// Which part of a row a thread loads: number `part` of `parts` parts of row `row`. Eight lanes take eight rows, so that their 16-byte stores hit no
// bank twice; the simdgroup's four such groups take neighboring parts.
struct Place {
  int row;
  int part;
};

template <int parts>
METAL_FUNC Place place(int u) {
  static_assert(parts % 4 == 0, "a simdgroup takes four parts of eight rows");
  Place p;
  p.row = u / (8 * parts) * 8 + u % 8;
  p.part = u / 8 % parts;
  return p;
}

// Load a unit of a row of W as floats; zeros if there is no row, and beyond its end.
template <typename Format>
METAL_FUNC void load_weight_unit(
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    int row,
    int column,
    int columns,
    thread float* unit) {
  if (row >= 0 && column < columns) {
    Format::load(values, scales, biases, row, column, columns, unit);
  } else {
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] = 0.0f;
    }
  }
}

// The sums of one simdgroup: all BM rows of the tile by its BN / 4 columns.
template <typename T>
struct Accumulators {
  // Metal 4.1 gives an implicit constructor no address space, but the matrices' own constructors need one.
  METAL_FUNC Accumulators() thread {
  }
  simdgroup_matrix<float, 8, 8> at[T::ROWS][T::COLUMNS];
};

template <typename T>
METAL_FUNC void clear(thread Accumulators<T>& acc) {
  METALENS_UNROLL
  for (int i = 0; i < T::ROWS; ++i) {
    METALENS_UNROLL
    for (int j = 0; j < T::COLUMNS; ++j) {
      acc.at[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
}

// acc += A [BM, BK] B [BK, BN]. B lies in memory as [BK, BN] or, if `transposed`, as [BN, BK].
template <typename T, bool transposed, int pitch_b>
METAL_FUNC void multiply(thread Accumulators<T>& acc, const threadgroup typename T::Operand* a, const threadgroup typename T::Operand* b, uint simd) {
  METALENS_UNROLL
  for (int k = 0; k < T::BK; k += 8) {
    simdgroup_matrix<typename T::Operand, 8, 8> columns[T::COLUMNS];
    METALENS_UNROLL
    for (int j = 0; j < T::COLUMNS; ++j) {
      const int column = (int(simd) * T::COLUMNS + j) * 8;
      simdgroup_load(columns[j], transposed ? b + column * pitch_b + k : b + k * pitch_b + column, pitch_b, ulong2(0), transposed);
    }
    METALENS_UNROLL
    for (int i = 0; i < T::ROWS; ++i) {
      simdgroup_matrix<typename T::Operand, 8, 8> rows;
      simdgroup_load(rows, a + i * 8 * T::PITCH + k, T::PITCH);
      METALENS_UNROLL
      for (int j = 0; j < T::COLUMNS; ++j) {
        simdgroup_multiply_accumulate(acc.at[i][j], rows, columns[j], acc.at[i][j]);
      }
    }
  }
}

// Store Z [BM, BN] over the operands, once all threads have read those. After it any thread may read Z.
template <typename T>
METAL_FUNC void put_tile(thread Accumulators<T>& acc, threadgroup float* shared, uint simd) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  METALENS_UNROLL
  for (int i = 0; i < T::ROWS; ++i) {
    METALENS_UNROLL
    for (int j = 0; j < T::COLUMNS; ++j) {
      simdgroup_store(acc.at[i][j], shared + i * 8 * PITCH_Z + (int(simd) * T::COLUMNS + j) * 8, PITCH_Z);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Compute Z = X W^T in `shared`. `rows` and `columns` define the rows and columns of the tile:
//   row(rows, i): the i-th row of X, or nullptr;   id(columns, j): the j-th row of W, or -1.
template <typename Format, int BM, typename Operand, typename Rows, typename Columns>
METAL_FUNC void tile_product(
    Tile<BM, Operand>,
    Rows rows,
    Columns columns,
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    int depth,
    threadgroup float* shared,
    uint simd,
    uint lane) {
  using T = Tile<BM, Operand>;
  constexpr int quads = T::BK / 4;     // of a row of X
  constexpr int units = T::BK / UNIT;  // of a row of W
  constexpr int x_loads = ceil_div(T::BM * quads, THREADS);
  constexpr int w_loads = ceil_div(T::BN * units, THREADS);
  threadgroup typename T::Operand* xs = reinterpret_cast<threadgroup typename T::Operand*>(shared);
  threadgroup typename T::Operand* ws = xs + T::BM * T::PITCH;
  const int me = thread_index(simd, lane);

  const device typename Rows::Element* my_rows[x_loads];
  int my_ids[w_loads];
  METALENS_UNROLL
  for (int s = 0; s < x_loads; ++s) {
    const int i = place<quads>(me + s * THREADS).row;
    my_rows[s] = i < T::BM ? row(rows, i) : nullptr;
  }
  METALENS_UNROLL
  for (int s = 0; s < w_loads; ++s) {
    const int j = place<units>(me + s * THREADS).row;
    my_ids[s] = j < T::BN ? id(columns, j) : -1;
  }

  Accumulators<T> acc;
  clear(acc);
  float unit[UNIT];
  for (int k = 0; k < depth; k += T::BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's Z, or the last operands, have been read
    METALENS_UNROLL
    for (int s = 0; s < x_loads; ++s) {
      const Place p = place<quads>(me + s * THREADS);
      if (p.row < T::BM) {
        store_four(load_four(my_rows[s], k + p.part * 4, my_rows[s] != nullptr ? depth : 0), xs + p.row * T::PITCH + p.part * 4);
      }
    }
    METALENS_UNROLL
    for (int s = 0; s < w_loads; ++s) {
      const Place p = place<units>(me + s * THREADS);
      if (p.row < T::BN) {
        load_weight_unit<Format>(values, scales, biases, my_ids[s], k + p.part * UNIT, depth, unit);
        store_unit(unit, ws + p.row * T::PITCH + p.part * UNIT);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply<T, true, T::PITCH>(acc, xs, ws, simd);
  }
  put_tile(acc, shared, simd);
}

// Consecutive rows of one matrix X, from `first` on.
template <typename T>
struct PlainRows {
  using Element = T;
  const device T* x;  // [count, depth]
  int first;
  int count;
  int depth;
};

template <typename T>
METAL_FUNC const device T* row(thread const PlainRows<T>& rows, int i) {
  return rows.first + i < rows.count ? rows.x + long(rows.first + i) * rows.depth : nullptr;
}

// Consecutive rows of W, from `first` on.
struct PlainColumns {
  int first;
  int count;
};

METAL_FUNC PlainColumns plain_columns(int first, int count) {
  PlainColumns columns;
  columns.first = first;
  columns.count = count;
  return columns;
}

METAL_FUNC int id(thread const PlainColumns& columns, int j) {
  return columns.first + j < columns.count ? columns.first + j : -1;
}

}  // namespace metalens
