// The float32 operands of multiply.h: panels of a frozen matrix, [depth, kWidth] floats, and packed rows.
#pragma once

#include "cpu/isa/elements.h"
#include "cpu/isa/transpose.h"

namespace metalens::cpu::METALENS_ISA {

constexpr int kWidth = 2 * kVector;

int64_t left_bytes(int64_t rows, int64_t depth) {
  return rows * depth * int64_t(sizeof(float));
}

void pack_left(const float* a, int64_t lda, int64_t rows, int64_t depth, void* left) {
  float* out = static_cast<float*>(left);
  for (int64_t m = 0; m < rows; ++m) __builtin_memcpy(out + m * depth, a + m * lda, depth * sizeof(float));
}

// Pack the affine codes of kVector rows side by side. A lane is a row, so that shifts alone unpack eight codes of each row, without a transposition.
template <int bits>
inline void pack_affine_rows(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, float* panel) {
  const int64_t groups = w.cols / w.group_size;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* codes[kVector];
    int64_t first_group[kVector];
    for (int lane = 0; lane < kVector; ++lane) {
      const int64_t row = column + smaller(half * kVector + lane, width - 1);
      codes[lane] = static_cast<const uint8_t*>(w.values) + (row * w.cols + start) / 8 * bits;
      first_group[lane] = row * groups;
    }
    float* out = panel + half * kVector;
    for (int64_t k = 0; k < depth;) {
      const int64_t group = (start + k) / w.group_size;
      vec scale{}, bias{};
      for (int lane = 0; lane < kVector; ++lane) {
        scale[lane] = widen(w.element, w.scales, first_group[lane] + group);
        bias[lane] = widen(w.element, w.biases, first_group[lane] + group);
      }
      const int64_t end = smaller((group + 1) * w.group_size - start, depth);
      for (; k < end; k += 8) {
        const int64_t at = k / 8 * bits;
        // Eight codes of a row are one 32-bit lane, or two where they are wider than 4 bits.
        constexpr int per_lane = bits <= 4 ? 8 : 4;
        ivec words[8 / per_lane] = {};
        for (int lane = 0; lane < kVector; ++lane) {
          const uint64_t eight = eight_codes<bits>(codes[lane] + at);
          for (int part = 0; part < 8 / per_lane; ++part) words[part][lane] = int32_t(eight >> (part * 4 * bits));
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const vec code = __builtin_convertvector((words[i / per_lane] >> (i % per_lane * bits)) & ((1 << bits) - 1), vec);
          store_vec(out + (k + i) * kWidth, code * scale + bias);
        }
      }
    }
  }
}

// Columns [start, start + depth) of kVector rows as floats. Dense float32 is read in place, other formats are unpacked.
struct FloatRows {
  FloatRows(const Matrix& w, int64_t column, int64_t rows, int64_t start, int64_t depth) {
    const bool in_place = w.format == Format::dense && w.element == Element::f32;
    for (int lane = 0; lane < kVector; ++lane) {
      const int64_t row = smaller(lane, rows - 1);  // lanes beyond the last row repeat it
      values[lane] = in_place ? static_cast<const float*>(w.values) + (column + row) * w.cols + start : unpacked[row];
      if (!in_place && lane < rows) unpack(w, column + lane, start, depth, unpacked[lane]);
    }
  }

  const float* values[kVector];
  float unpacked[kVector][kReductionBlock];
};

// Pack kVector rows of any matrix side by side, by squares that are transposed in registers.
inline void pack_values(const Matrix& w, int64_t column, int64_t rows, int64_t start, int64_t depth, float* panel) {
  const FloatRows from(w, column, rows, start, depth);
  const auto& values = from.values;
  int64_t k = 0;
  for (; k + kVector <= depth; k += kVector) {
    vec square[kVector];
#pragma GCC unroll 16
    for (int lane = 0; lane < kVector; ++lane) square[lane] = load_vec(values[lane] + k);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kVector; ++i) store_vec(panel + (k + i) * kWidth, square[i]);
  }
  for (; k < depth; ++k) {
    for (int lane = 0; lane < kVector; ++lane) panel[k * kWidth + lane] = values[lane][k];
  }
}

void pack_rows(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, void* out) {
  float* panel = static_cast<float*>(out);
  if (w.format == Format::affine) {
    return with_format(w, [&]<Format, int bits>() { pack_affine_rows<bits>(w, column, width, start, depth, panel); });
  }
  for (int half = 0; half * kVector < width; ++half) {
    pack_values(w, column + half * kVector, smaller(kVector, width - half * kVector), start, depth, panel + half * kVector);
  }
}

void pack_columns(const Matrix& w, int64_t column, int64_t width, int64_t start, int64_t depth, void* out) {
  float* panel = static_cast<float*>(out);
  if (w.format == Format::dense && w.element == Element::f32 && width == kWidth) {
    const float* values = static_cast<const float*>(w.values) + start * w.cols + column;
    for (int64_t k = 0; k < depth; ++k, values += w.cols, panel += kWidth) {
      store_vec(panel, load_vec(values));
      store_vec(panel + kVector, load_vec(values + kVector));
    }
  } else if (w.format == Format::dense) {
    for (int64_t k = 0; k < depth; ++k) unpack(w, start + k, column, width, panel + k * kWidth);
  } else {
    with_format(w, [&]<Format format, int bits>() {
      for (int64_t k = 0; k < depth; ++k) dequantize<format, bits>(w, start + k, column, width, panel + k * kWidth);
    });
  }
}

}  // namespace metalens::cpu::METALENS_ISA
