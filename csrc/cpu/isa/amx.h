// Products on AMX tiles, 32 x 32 elements of the result at a time. An operand has one part or two (see bf16.h). With two parts, three `terms` are
// summed: every product of parts except that of the two second ones. The left is [part][rows / 16][depth / 32] tiles of 16 x 32 values.
#pragma once

#include "cpu/isa/bf16.h"
#include "cpu/isa/tiles.h"

namespace metalens::cpu::METALENS_ISA {

constexpr int64_t kRowBytes = 64;

constexpr int parts_of(int terms) {
  return terms == 1 ? 1 : 2;
}

inline int64_t row_tiles_of(int64_t rows) {
  return (rows + 15) / 16;
}

// The number of words in one part of the left.
inline int64_t tile_left_words(int64_t rows, int64_t depth) {
  return row_tiles_of(rows) * steps_of(depth) * kTileWords;
}

template <int terms>
int64_t tile_left_bytes(int64_t rows, int64_t depth) {
  return parts_of(terms) * tile_left_words(rows, depth) * int64_t(sizeof(uint32_t));
}

template <int part>
inline void pack_tiles(const float* a, int64_t lda, int64_t rows, int64_t depth, uint32_t* words) {
  const int64_t steps = steps_of(depth);
  for (int64_t m = 0; m < row_tiles_of(rows) * 16; ++m) {
    uint32_t* row = words + m / 16 * steps * kTileWords + m % 16 * 16;
    if (m < rows) {
      narrow_row<part>(a + m * lda, depth, row, kTileWords);
    } else {
      for (int64_t step = 0; step < steps; ++step) store_words(row + step * kTileWords, uvec{});
    }
  }
}

template <int terms>
void pack_tile_left(const float* a, int64_t lda, int64_t rows, int64_t depth, void* left) {
  uint32_t* words = static_cast<uint32_t*>(left);
  pack_tiles<0>(a, lda, rows, depth, words);
  if constexpr (terms > 1) pack_tiles<1>(a, lda, rows, depth, words + tile_left_words(rows, depth));
}

// Tiles 0-3 hold the sums, row by row; 4 and 5 hold the left, 6 and 7 the panel. Of the 2 x 2 tiles of sums, row_tiles x column_tiles are used.
template <int row_tiles, int column_tiles>
inline void add_products(const uint32_t* a, const uint32_t* panel, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, a += kTileWords, panel += 2 * kTileWords) {
    load_tile<4>(a, kRowBytes);
    load_tile<6>(panel, kRowBytes);
    dot_tiles<0, 4, 6>();
    if constexpr (column_tiles == 2) {
      load_tile<7>(panel + kTileWords, kRowBytes);
      dot_tiles<1, 4, 7>();
    }
    if constexpr (row_tiles == 2) {
      load_tile<5>(a + steps * kTileWords, kRowBytes);
      dot_tiles<2, 5, 6>();
      if constexpr (column_tiles == 2) dot_tiles<3, 5, 7>();
    }
  }
}

template <int row_tiles, int column_tiles>
inline void load_sums(const float* c, int64_t ldc) {
  const int64_t stride = ldc * int64_t(sizeof(float));
  load_tile<0>(c, stride);
  if constexpr (column_tiles == 2) load_tile<1>(c + 16, stride);
  if constexpr (row_tiles == 2) load_tile<2>(c + 16 * ldc, stride);
  if constexpr (row_tiles == 2 && column_tiles == 2) load_tile<3>(c + 16 * ldc + 16, stride);
}

template <int row_tiles, int column_tiles>
inline void store_sums(float* c, int64_t ldc) {
  const int64_t stride = ldc * int64_t(sizeof(float));
  store_tile<0>(c, stride);
  if constexpr (column_tiles == 2) store_tile<1>(c + 16, stride);
  if constexpr (row_tiles == 2) store_tile<2>(c + 16 * ldc, stride);
  if constexpr (row_tiles == 2 && column_tiles == 2) store_tile<3>(c + 16 * ldc + 16, stride);
}

inline void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
}

// Compute whole tiles of c. `part` is the number of words in one part of the left.
template <int terms, int row_tiles, int column_tiles>
void multiply_tiles(const uint32_t* a, int64_t part, const uint32_t* panel, int64_t steps, float* c, int64_t ldc, bool accumulate) {
  if (accumulate) {
    load_sums<row_tiles, column_tiles>(c, ldc);
  } else {
    zero_sums();
  }
  add_products<row_tiles, column_tiles>(a, panel, steps);
  if constexpr (terms > 1) {
    add_products<row_tiles, column_tiles>(a, panel + kPanelWords, steps);
    add_products<row_tiles, column_tiles>(a + part, panel, steps);
  }
  store_sums<row_tiles, column_tiles>(c, ldc);
}

inline void copy_block(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) __builtin_memcpy(to + m * to_stride, from + m * from_stride, columns * sizeof(float));
}

// Sums every element in the same order wherever it lies, so that a row computed alone gives the same bits as among others.
template <int terms>
void multiply_on_tiles(const void* left, int64_t rows, const void* packed, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate) {
  const uint32_t* a = static_cast<const uint32_t*>(left);
  const uint32_t* panel = static_cast<const uint32_t*>(packed);
  const int64_t steps = steps_of(depth), part = tile_left_words(rows, depth);
  const auto wide = width > 16 ? multiply_tiles<terms, 2, 2> : multiply_tiles<terms, 2, 1>;
  const auto wide_last = width > 16 ? multiply_tiles<terms, 1, 2> : multiply_tiles<terms, 1, 1>;
  configure_tiles();
  for (int64_t m = 0; m < rows; m += 32, a += 2 * steps * kTileWords) {
    const int64_t height = smaller(32, rows - m);
    const auto multiply_block = height > 16 ? wide : wide_last;
    float* block = c + m * ldc;
    if (height % 16 == 0 && width % 16 == 0) {
      multiply_block(a, part, panel, steps, block, ldc, accumulate);
    } else {
      float whole[32 * 32] = {};
      if (accumulate) copy_block(block, ldc, whole, 32, height, width);
      multiply_block(a, part, panel, steps, whole, 32, accumulate);
      copy_block(whole, 32, block, ldc, height, width);
    }
  }
  release_tiles();
}

template <int terms>
constexpr Multiplier kTileMultiplier{
    .panel_width = kPanelColumns,
    .left_bytes = tile_left_bytes<terms>,
    .panel_bytes = parts_of(terms) * kPanelWords * int64_t(sizeof(uint32_t)),
    .pack_left = pack_tile_left<terms>,
    .pack_rows = pack_word_rows<parts_of(terms)>,
    .pack_columns = pack_word_columns<parts_of(terms)>,
    .multiply = multiply_on_tiles<terms>,
};

}  // namespace metalens::cpu::METALENS_ISA
