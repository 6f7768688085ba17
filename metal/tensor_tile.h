// The tile product of tile.h on the matrix units of a GPU, by Metal 4's tensor operations: Z [BM, BN] = X [BM, D] W [BN, D]^T, in threadgroup memory.
//
// Matrix units multiply halves. So that Z is that of float32 operands, 32 columns of a row are halves times numbers of their own:
//
//   x = 2^e (high + low)      e such that the largest of the 32 is in [2^14, 2^15). Two halves keep 23 of a float's 24 bits, or differ from x
//                             by 2^-39 of the largest. With PARTS = 1, which permits rounding, high alone keeps 11.
//   w = s c + b               an affine format's codes, less half their range so that b is small: c is a whole number, exact in one half.
//   w = 2^e c                 other formats, whose numbers have at most 11 bits; float32 is high + low as x is.
//
//   z = sum over every 32 columns of   s 2^e (sum of low c + sum of high c)  +  b (sum of x)
//
// Products of halves are exact in float32, and all sums are float32. With A = sum of |x| (|s c| + |b|), z is off by at most (72 + D / 16) 2^-24 A,
// and 2^-39 of a step's largest |x| times its sum of |s c|; (136 + D / 16) 2^-24 A for weights of float32. For comparison: D 2^-24 sum of |x w| is
// the bound of sums of float32. A GPU that takes subnormal halves for zeros adds 2^-28 of the largest instead of 2^-39. A row that holds an infinity
// gives NaN.
//
// Each of the 4 simdgroups multiplies half of the rows with half of the ids: one or two fragments of 16 x 32. Which elements of a fragment a lane
// holds is asked for, never assumed.
#pragma once

#include "tile.h"

#if __METAL_VERSION__ < 400 || !defined(__HAVE_TENSOR__)
#error "Tensor operations need Metal 4: macOS 26 or later."
#endif

#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

#include <metal_tensor>

namespace metalens {

// Halves that hold a number of the format, less its group's scale.
template <typename Format>
struct HalvesOf {
  static constexpr constant int COUNT = 1;
};
template <>
struct HalvesOf<Dense<float>> {
  static constexpr constant int COUNT = 2;
};

template <int BM_, int PARTS_, typename Format>
struct TensorTile {
  static constexpr constant int BM = BM_;
  static constexpr constant int BN = TILE_IDS;
  static constexpr constant int BK = TILE_DEPTH;
  static constexpr constant int PARTS = PARTS_;  // halves of an x
  static constexpr constant int PARTS_W = PARTS < HalvesOf<Format>::COUNT ? PARTS : HalvesOf<Format>::COUNT;
  // Halves of a row, as in Tile<BM, half>.
  static constexpr constant int PITCH = BK + 8;
  // Rows and ids of a simdgroup.
  static constexpr constant int SIMD_ROWS = BM / 2;
  static constexpr constant int SIMD_IDS = BN / 2;
  // Floats of threadgroup memory: the operands with the factors of their rows, or Z in their place.
  static constexpr constant int HALVES_X = PARTS * BM * PITCH;
  static constexpr constant int HALVES_W = PARTS_W * BN * PITCH;
  static constexpr constant int OPERANDS = (HALVES_X + HALVES_W) / 2 + 2 * (BM + BN);
  static constexpr constant int FLOATS = OPERANDS > BM* PITCH_Z ? OPERANDS : BM* PITCH_Z;
  static_assert(SIMD_ROWS % 16 == 0 && SIMD_IDS == 32, "a tensor operation multiplies 16 x 32 at least");
  static_assert(SIMDS == 4, "the simdgroups are two by two");
};

// The operands of a step in threadgroup memory.
struct TensorOperands {
  threadgroup half* x;           // [PARTS, BM, PITCH]
  threadgroup half* w;           // [PARTS_W, BN, PITCH]
  threadgroup float2* factor_x;  // [BM] 2^e and the sum of a row of X
  threadgroup float2* factor_w;  // [BN] s, or 2^e, and b of a row of W
};

template <typename T>
METAL_FUNC TensorOperands tensor_operands(threadgroup float* shared) {
  TensorOperands operands;
  operands.factor_x = reinterpret_cast<threadgroup float2*>(shared);
  operands.factor_w = operands.factor_x + T::BM;
  operands.x = reinterpret_cast<threadgroup half*>(operands.factor_w + T::BN);
  operands.w = operands.x + T::HALVES_X;
  return operands;
}

// The four units of a row lie in lanes whose numbers differ by 8 and 16 (see place). Each of them gets the sum, or the largest, over the row.
METAL_FUNC float sum_of_row(float mine) {
  const float of_two = mine + simd_shuffle_xor(mine, 8);
  return of_two + simd_shuffle_xor(of_two, 16);
}

METAL_FUNC float largest_of_row(float mine) {
  const float of_two = max(mine, simd_shuffle_xor(mine, 8));
  return max(of_two, simd_shuffle_xor(of_two, 16));
}

// Divide the unit of a row by a power of two, which is returned, such that the largest number of the row's four units is in [2^14, 2^15).
METAL_FUNC float scale_row(thread float* unit) {
  float largest = 0.0f;
  METALENS_UNROLL
  for (int i = 0; i < UNIT; ++i) {
    largest = max(largest, abs(unit[i]));
  }
  // Between 2^-112 and 2^127, so that the power and its inverse are normal numbers.
  const uint exponent = clamp(as_type<uint>(largest_of_row(largest)) >> 23, 15u, 254u);
  const float inverse = as_type<float>((268u - exponent) << 23);
  METALENS_UNROLL
  for (int i = 0; i < UNIT; ++i) {
    unit[i] *= inverse;
  }
  return as_type<float>((exponent - 14u) << 23);
}

// Store a unit as `parts` halves of falling size, in arrays that are `pitch` halves apart.
template <int parts>
METAL_FUNC void store_parts(thread float* unit, threadgroup half* to, int pitch) {
  METALENS_UNROLL
  for (int p = 0; p < parts; ++p) {
    store_unit(unit, to + p * pitch);
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] -= float(half(unit[i]));
    }
  }
}

// A row's numbers as c, with the factors (s, b).
template <typename Format>
struct Factored {
  static constexpr constant bool BIASED = false;
  static METAL_FUNC float2 load(
      const device typename Format::Values* values,
      const device typename Format::Scales* scales,
      const device typename Format::Biases* biases,
      int row,
      int column,
      int columns,
      thread float* unit) {
    load_weight_unit<Format>(values, scales, biases, row, column, columns, unit);
    return float2(scale_row(unit), 0.0f);
  }
};

template <int bits, int group, typename S>
struct Factored<Affine<bits, group, S>> {
  static constexpr constant bool BIASED = true;
  static METAL_FUNC float2
  load(const device uint* values, const device S* scales, const device S* biases, int row, int column, int columns, thread float* unit) {
    static_assert(group >= TILE_DEPTH, "the columns of a step have one scale");
    constexpr float middle = float(1 << (bits - 1));
    if (row < 0 || column >= columns) {
      METALENS_UNROLL
      for (int i = 0; i < UNIT; ++i) {
        unit[i] = 0.0f;
      }
      return float2(0.0f);
    }
    Integers<bits>::unpack(unit_codes<bits>(unit_at<bits>(values, row, column, columns)), unit);
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] -= middle;
    }
    const long shared = long(row) * (columns / group) + column / group;
    const float scale = float(scales[shared]);
    return float2(scale, fma(scale, middle, float(biases[shared])));
  }
};

template <typename Format, int BM, int PARTS, typename Rows, typename Columns>
METAL_FUNC void tile_product(
    TensorTile<BM, PARTS, Format>,
    Rows rows,
    Columns columns,
    const device typename Format::Values* values,
    const device typename Format::Scales* scales,
    const device typename Format::Biases* biases,
    int depth,
    threadgroup float* shared,
    uint simd,
    uint lane) {
  using T = TensorTile<BM, PARTS, Format>;
  // Rows of 16 bits need no second half.
  constexpr int parts = sizeof(typename Rows::Element) == 2 ? 1 : PARTS;
  constexpr int units = T::BK / UNIT;  // of a row
  constexpr int x_loads = T::BM * units / THREADS;
  constexpr int w_loads = T::BN * units / THREADS;
  const TensorOperands operands = tensor_operands<T>(shared);
  const int me = thread_index(simd, lane);
  const int first_row = int(simd) / 2 * T::SIMD_ROWS;
  const int first_id = int(simd) % 2 * T::SIMD_IDS;

  const device typename Rows::Element* my_rows[x_loads];
  int my_ids[w_loads];
  METALENS_UNROLL
  for (int s = 0; s < x_loads; ++s) {
    my_rows[s] = row(rows, place<units>(me + s * THREADS).row);
  }
  METALENS_UNROLL
  for (int s = 0; s < w_loads; ++s) {
    my_ids[s] = id(columns, place<units>(me + s * THREADS).row);
  }

  // The operation of a simdgroup: [SIMD_ROWS, SIMD_IDS] += rows [SIMD_ROWS, BK] ids [SIMD_IDS, BK]^T.
  constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
      T::SIMD_ROWS, T::SIMD_IDS, T::BK, false, true, false, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  using TensorRows = tensor<threadgroup half, extents<int, T::BK, T::SIMD_ROWS>, tensor_inline>;
  using TensorIds = tensor<threadgroup half, extents<int, T::BK, T::SIMD_IDS>, tensor_inline>;
  mpp::tensor_ops::matmul2d<descriptor, execution_simdgroup> product;
  auto sums = product.template get_destination_cooperative_tensor<TensorRows, TensorIds, float>();
  auto of_step = product.template get_destination_cooperative_tensor<TensorRows, TensorIds, float>();
  METALENS_UNROLL
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    if (sums.is_valid_element(i)) {
      sums[i] = 0.0f;
    }
  }
  float unit[UNIT];
  for (int k = 0; k < depth; k += T::BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's Z, or the last operands, have been read
    METALENS_UNROLL
    for (int s = 0; s < x_loads; ++s) {
      const Place p = place<units>(me + s * THREADS);
      const int column = k + p.part * UNIT, end = my_rows[s] != nullptr ? depth : 0;
      load_eight(my_rows[s], column, end, unit);
      float sum = 0.0f;
      if (Factored<Format>::BIASED) {
        sum = sum_of_row(((unit[0] + unit[1]) + (unit[2] + unit[3])) + ((unit[4] + unit[5]) + (unit[6] + unit[7])));
      }
      const float power = scale_row(unit);
      if (p.part == 0) {
        operands.factor_x[p.row] = float2(power, sum);
      }
      store_parts<parts>(unit, operands.x + p.row * T::PITCH + p.part * UNIT, T::BM * T::PITCH);
    }
    METALENS_UNROLL
    for (int s = 0; s < w_loads; ++s) {
      const Place p = place<units>(me + s * THREADS);
      const float2 factors = Factored<Format>::load(values, scales, biases, my_ids[s], k + p.part * UNIT, depth, unit);
      if (p.part == 0) {
        operands.factor_w[p.row] = factors;
      }
      store_parts<T::PARTS_W>(unit, operands.w + p.row * T::PITCH + p.part * UNIT, T::BN * T::PITCH);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    METALENS_UNROLL
    for (ushort i = 0; i < of_step.get_capacity(); ++i) {
      if (of_step.is_valid_element(i)) {
        of_step[i] = 0.0f;
      }
    }
    METALENS_UNROLL
    for (int small = parts + T::PARTS_W - 2; small >= 0; --small) {  // the smallest products first
      METALENS_UNROLL
      for (int p = 0; p < parts; ++p) {
        if (small - p >= 0 && small - p < T::PARTS_W) {
          TensorRows of_rows(operands.x + (p * T::BM + first_row) * T::PITCH, extents<int, T::BK, T::SIMD_ROWS>(), array<int, 2>{1, T::PITCH});
          TensorIds of_ids(operands.w + ((small - p) * T::BN + first_id) * T::PITCH, extents<int, T::BK, T::SIMD_IDS>(), array<int, 2>{1, T::PITCH});
          product.run(of_rows, of_ids, of_step);
        }
      }
    }
    METALENS_UNROLL
    for (ushort i = 0; i < sums.get_capacity(); ++i) {
      if (sums.is_valid_element(i)) {
        const auto index = sums.get_multidimensional_index(i);  // (id, row)
        const float2 of_x = operands.factor_x[first_row + index[1]];
        const float2 of_w = operands.factor_w[first_id + index[0]];
        sums[i] += fma(of_w.x, of_x.x * of_step[i], of_w.y * of_x.y);
      }
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  METALENS_UNROLL
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    if (sums.is_valid_element(i)) {
      const auto index = sums.get_multidimensional_index(i);
      shared[(first_row + index[1]) * PITCH_Z + first_id + index[0]] = sums[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

}  // namespace metalens
