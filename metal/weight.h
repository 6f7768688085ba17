// The formats of a weight W [rows, columns]: dense, and MLX's quantized ones, where a group of columns shares a scale (and a bias).
//
// W is read in units: eight values from a multiple of eight columns on, which fill exactly `bits` bytes in every format. A format defines how a row
// is packed and converts one unit to floats. It can also read a span: the codes of four units, with their scale, in as few loads as possible, to be
// converted unit by unit. Values, Scales and Biases are the types of its arrays; a format without scales or biases gets another
// array, which it ignores. Offsets are 64-bit: 8 bits, 8192 columns and 262208 rows are more than 2^31 bytes.
#pragma once

#include "memory.h"

namespace metalens {

// Codes 0 to 3 of a unit, packed from bit 0 of `low` on, and codes 4 to 7, from bit 0 of `high` on. With 4 bits, `low` holds all eight.
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
    codes.low = *reinterpret_cast<const device uint*>(unit);
    codes.high = 0;
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

// Put the halves whose bits lie in `both` to positions i and j of a unit.
METAL_FUNC void put_halves(uint both, int i, int j, thread float* unit) {
  const half2 halves = as_type<half2>(both);
  unit[i] = float(halves.x);
  unit[j] = float(halves.y);
}

// Integers from 0 on. The half whose bits are 0x6400 + code is 1024 + code: so a pair of codes of 4 or 8 bits becomes exact numbers without a
// conversion, which takes four times as long as an addition, and with few shifts.
template <int bits>
struct Integers {
  static METAL_FUNC void unpack(Codes codes, thread float* unit) {
    if (bits == 4) {
      METALENS_UNROLL
      for (int i = 0; i < 4; ++i) {  // codes i and i + 4 of the unit lie 16 bits apart
        const uint word = i < 2 ? codes.low : codes.low >> 8;
        const half2 pair = as_type<half2>((word & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u)) | 0x64006400u);
        const half factor = half(i % 2 == 0 ? 1.0f : 0.0625f), below = half(i % 2 == 0 ? 1024.0f : 64.0f);
        unit[i] = float(pair.x * factor - below);
        unit[i + 4] = float(pair.y * factor - below);
      }
    } else if (bits == 8) {
      METALENS_UNROLL
      for (int i = 0; i < UNIT; i += 4) {  // bytes 0 and 2, then 1 and 3, of a word
        const uint word = i == 0 ? codes.low : codes.high;
        const half2 even = as_type<half2>((word & 0x00ff00ffu) | 0x64006400u);
        const half2 odd = as_type<half2>(((word >> 8) & 0x00ff00ffu) | 0x64006400u);
        unit[i] = float(even.x - half(1024.0f));
        unit[i + 1] = float(odd.x - half(1024.0f));
        unit[i + 2] = float(even.y - half(1024.0f));
        unit[i + 3] = float(odd.y - half(1024.0f));
      }
    } else {
      METALENS_UNROLL
      for (int i = 0; i < UNIT; ++i) {
        unit[i] = float(code_at<bits>(codes, i));
      }
    }
  }
};

// A sign, four bits of exponent and three of mantissa: read as a half, whose exponent has a bias larger by 8.
struct E4M3 {
  static METAL_FUNC float value(uint code) {
    return float(as_type<half>(ushort((code & 127u) << 7 | (code & 128u) << 8))) * 256.0f;
  }
  static METAL_FUNC void unpack(Codes codes, thread float* unit) {
    METALENS_UNROLL
    for (int i = 0; i < UNIT; i += 4) {  // bytes 0 and 2, then 1 and 3, of a word
      const uint word = i == 0 ? codes.low : codes.high;
      put_halves((word & 0x007f007fu) << 7 | (word & 0x00800080u) << 8, i, i + 2, unit);
      put_halves((word & 0x7f007f00u) >> 1 | (word & 0x80008000u), i + 1, i + 3, unit);
    }
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] *= 256.0f;
    }
  }
};

// A sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Read as a half, whose exponent has a bias larger by 14.
struct E2M1 {
  static METAL_FUNC void unpack(Codes codes, thread float* unit) {
    const uint word = codes.low;  // codes i and i + 4 of the unit lie 16 bits apart
    put_halves((word & 0x00070007u) << 9 | (word & 0x00080008u) << 12, 0, 4, unit);
    put_halves((word & 0x00700070u) << 5 | (word & 0x00800080u) << 8, 1, 5, unit);
    put_halves((word & 0x07000700u) << 1 | (word & 0x08000800u) << 4, 2, 6, unit);
    put_halves((word & 0x70007000u) >> 3 | (word & 0x80008000u), 3, 7, unit);
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] *= 16384.0f;
    }
  }
};

template <int bits>
METAL_FUNC const device uchar* unit_at(const device uint* values, long row, int column, int columns) {
  return reinterpret_cast<const device uchar*>(values) + (row * (columns / UNIT) + column / UNIT) * bits;
}

// A span begins at a multiple of its columns. With 32 columns, its codes fill `bits` whole words.
constexpr constant int SPAN = 32;

template <int bits>
struct Words {
  uint4 fours[(bits + 3) / 4];
};

template <int bits>
METAL_FUNC Words<bits> no_words() {
  Words<bits> words;
  METALENS_UNROLL
  for (int i = 0; i < (bits + 3) / 4; ++i) {
    words.fours[i] = uint4(0u);
  }
  return words;
}

// The words of a span from `column` on, zeros beyond the end of the row.
template <int bits>
METAL_FUNC Words<bits> span_words(const device uint* values, long row, int column, int columns) {
  const device uint* from = reinterpret_cast<const device uint*>(unit_at<bits>(values, row, column, columns));
  Words<bits> words = no_words<bits>();
  const bool whole = column + SPAN <= columns;
  METALENS_UNROLL
  for (int i = 0; i < bits; ++i) {
    if (whole && i / 4 < bits / 4) {
      if (i % 4 == 0) {
        words.fours[i / 4] = uint4(*reinterpret_cast<const device packed_uint4*>(from + i));
      }
    } else if (whole || i * 32 < (columns - column) * bits) {
      words.fours[i / 4][i % 4] = from[i];
    }
  }
  return words;
}

// Word i of a span. i must be known to the compiler.
template <int bits>
METAL_FUNC uint word_at(thread const Words<bits>& words, int i) {
  return words.fours[i / 4][i % 4];
}

template <int bits>
METAL_FUNC uint four_codes_of(thread const Words<bits>& words, int first_bit) {
  const int i = first_bit / 32, shift = first_bit % 32;
  const uint low = word_at<bits>(words, i) >> shift;
  return shift + 4 * bits <= 32 ? low : low | word_at<bits>(words, min(i + 1, bits - 1)) << ((32 - shift) % 32);
}

template <int bits>
METAL_FUNC Codes codes_of(thread const Words<bits>& words, int u) {
  Codes codes;
  if (bits == 4) {
    codes.low = word_at<bits>(words, u);
    codes.high = 0;
  } else {
    codes.low = four_codes_of<bits>(words, u * UNIT * bits);
    codes.high = four_codes_of<bits>(words, u * UNIT * bits + 4 * bits);
  }
  return codes;
}

template <typename S>
struct Dense {
  using Values = S;
  using Scales = S;
  using Biases = S;
  static METAL_FUNC void load(const device S* values, const device S*, const device S*, long row, int column, int columns, thread float* unit) {
    load_eight(values + row * columns, column, columns, unit);
  }

  // A span of floats stays in memory until its units are used.
  struct Span {
    const device S* row;
    int column;
    int columns;
  };
  static METAL_FUNC Span read(const device S* values, const device S*, const device S*, long row, int column, int columns) {
    Span span;
    span.row = values + row * columns;
    span.column = column;
    span.columns = columns;
    return span;
  }
  static METAL_FUNC Span nothing() {
    Span span;
    span.row = nullptr;
    span.column = 0;
    span.columns = 0;
    return span;
  }
  static METAL_FUNC void unpack(thread const Span& span, int u, thread float* unit) {
    load(span.row, span.row, span.row, 0, span.column + u * UNIT, span.columns, unit);
  }
};

// scale * code + bias. All groups are at least a span wide.
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
    convert(codes, scale, bias, unit);
  }

  struct Span {
    Words<bits> words;
    float scale;
    float bias;
  };
  static METAL_FUNC Span read(const device uint* values, const device S* scales, const device S* biases, long row, int column, int columns) {
    static_assert(group >= SPAN, "a span has one scale");
    const long shared = row * (columns / group) + column / group;
    Span span;
    span.words = span_words<bits>(values, row, column, columns);
    span.scale = float(scales[shared]);
    span.bias = float(biases[shared]);
    return span;
  }
  static METAL_FUNC Span nothing() {
    Span span;
    span.words = no_words<bits>();
    span.scale = 0.0f;
    span.bias = 0.0f;
    return span;
  }
  static METAL_FUNC void unpack(thread const Span& span, int u, thread float* unit) {
    convert(codes_of<bits>(span.words, u), span.scale, span.bias, unit);
  }

  static METAL_FUNC void convert(Codes codes, float scale, float bias, thread float* unit) {
    Integers<bits>::unpack(codes, unit);
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] = fma(scale, unit[i], bias);
    }
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
    convert(codes, scale, unit);
  }

  static constexpr constant int SCALES = group < SPAN ? SPAN / group : 1;  // of a span
  struct Span {
    Words<bits> words;
    float scales[SCALES];
  };
  static METAL_FUNC Span read(const device uint* values, const device uchar* scales, const device uchar*, long row, int column, int columns) {
    Span span;
    span.words = span_words<bits>(values, row, column, columns);
    METALENS_UNROLL
    for (int i = 0; i < SCALES; ++i) {
      span.scales[i] = column + i * group < columns ? Scale::value(scales[row * (columns / group) + column / group + i]) : 0.0f;
    }
    return span;
  }
  static METAL_FUNC Span nothing() {
    Span span;
    span.words = no_words<bits>();
    METALENS_UNROLL
    for (int i = 0; i < SCALES; ++i) {
      span.scales[i] = 0.0f;
    }
    return span;
  }
  static METAL_FUNC void unpack(thread const Span& span, int u, thread float* unit) {
    convert(codes_of<bits>(span.words, u), span.scales[SCALES == 1 ? 0 : u * UNIT / group], unit);
  }

  static METAL_FUNC void convert(Codes codes, float scale, thread float* unit) {
    Element::unpack(codes, unit);
    METALENS_UNROLL
    for (int i = 0; i < UNIT; ++i) {
      unit[i] *= scale;
    }
  }
};

using MXFP4 = ScaledFloats<4, 32, E2M1, E8M0>;
using MXFP8 = ScaledFloats<8, 32, E4M3, E8M0>;
using NVFP4 = ScaledFloats<4, 16, E2M1, E4M3>;

}  // namespace metalens
