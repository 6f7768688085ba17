// The formats of a weight W [rows, columns]: dense, and MLX's quantized ones, where a group of columns shares a scale (and a bias).
//
// W is read in units: eight values from a multiple of eight columns on, which fill exactly `bits` bytes in every format. A format defines how a row
// is packed and converts one unit to floats. Values, Scales and Biases are the types of its arrays; a format without scales or biases gets another
// array, which it ignores. Offsets are 64-bit: 8 bits, 8192 columns and 262208 rows are more than 2^31 bytes.
#pragma once

#include "common.h"

namespace metalens {

// Codes 0 to 3 of a unit, packed from bit 0 of `low` on, and codes 4 to 7, from bit 0 of `high` on.
struct Codes {
  uint low;
  uint high;
};

// Four codes span at most (bits + 1) / 2 bytes. With odd bits, the second four begin in the middle of a byte.
template <int bits>
METAL_FUNC uint four_codes(const device uchar* unit, int half_of_unit) {
  const device uchar* first = unit + half_of_unit * bits / 2;
  uint word = 0;
  METALENS_UNROLL
  for (int i = 0; i < (bits + 1) / 2; ++i) {
    word |= uint(first[i]) << (8 * i);
  }
  return bits % 2 == 1 && half_of_unit == 1 ? word >> 4 : word;
}

template <int bits>
METAL_FUNC Codes unit_codes(const device uchar* unit) {
  Codes codes;
  if (bits == 4) {
    const uint word = *reinterpret_cast<const device uint*>(unit);
    codes.low = word;
    codes.high = word >> 16;
  } else if (bits == 8) {
    const device uint* words = reinterpret_cast<const device uint*>(unit);
    codes.low = words[0];
    codes.high = words[1];
  } else {
    codes.low = four_codes<bits>(unit, 0);
    codes.high = four_codes<bits>(unit, 1);
  }
  return codes;
}

template <int bits>
METAL_FUNC uint code_at(Codes codes, int i) {
  return ((i < 4 ? codes.low : codes.high) >> (bits * (i % 4))) & ((1u << bits) - 1u);
}

template <int bits>
METAL_FUNC const device uchar* unit_at(const device uint* values, long row, int column, int columns) {
  return reinterpret_cast<const device uchar*>(values) + (row * (columns / UNIT) + column / UNIT) * bits;
}

template <typename S>
struct Dense {
  using Values = S;
  using Scales = S;
  using Biases = S;
  static METAL_FUNC void load(const device S* values, const device S*, const device S*, long row, int column, int columns, thread float* unit) {
    const device S* first = values + row * columns + column;
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] = column + i < columns ? float(first[i]) : 0.0f;
    }
  }
};

// scale * code + bias.
template <int bits, int group, typename S>
struct Affine {
  using Values = uint;
  using Scales = S;
  using Biases = S;
  static METAL_FUNC void load(
      const device uint* values, const device S* scales, const device S* biases, long row, int column, int columns, thread float* unit) {
    const long shared = row * (columns / group) + column / group;
    const float scale = float(scales[shared]);
    const float bias = float(biases[shared]);
    const Codes codes = unit_codes<bits>(unit_at<bits>(values, row, column, columns));
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] = fma(scale, float(code_at<bits>(codes, i)), bias);
    }
  }
};

// A sign, four bits of exponent and three of mantissa: read as a half, whose exponent has a bias larger by 8.
struct E4M3 {
  static METAL_FUNC float value(uint code) {
    const float magnitude = float(as_type<half>(ushort((code & 127u) << 7))) * 256.0f;
    return code & 128u ? -magnitude : magnitude;
  }
};

// A sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
struct E2M1 {
  static METAL_FUNC float value(uint code) {
    const float magnitude = float(as_type<half>(ushort((code & 7u) << 9))) * 16384.0f;
    return code & 8u ? -magnitude : magnitude;
  }
};

// A power of two from 2^-127 on, kept in a float because 16 bits cannot hold it.
struct E8M0 {
  static METAL_FUNC float value(uint code) {
    return as_type<float>(code == 0u ? 0x00400000u : code << 23);
  }
};

// Small floats. The scale of each group is an 8-bit float.
template <int bits, int group, typename Element, typename Scale>
struct ScaledFloats {
  using Values = uint;
  using Scales = uchar;
  using Biases = uchar;
  static METAL_FUNC void load(
      const device uint* values, const device uchar* scales, const device uchar*, long row, int column, int columns, thread float* unit) {
    const float scale = Scale::value(scales[row * (columns / group) + column / group]);
    const Codes codes = unit_codes<bits>(unit_at<bits>(values, row, column, columns));
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] = scale * Element::value(code_at<bits>(codes, i));
    }
  }
};

using MXFP4 = ScaledFloats<4, 32, E2M1, E8M0>;
using MXFP8 = ScaledFloats<8, 32, E4M3, E8M0>;
using NVFP4 = ScaledFloats<4, 16, E2M1, E4M3>;

}  // namespace metalens
