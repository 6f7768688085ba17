// The CPU kernels' contract: what every instruction set implements, and how one is chosen at run time.
//
// One source (gemm_kernels.inc) is compiled once per instruction set, each in a translation unit with its own flags. A unit exports nothing but its
// table, and includes no header with inline code of ours or of the standard library, so the linker can never pick a wide copy of a shared function.
#pragma once

#include <cstdint>

namespace metalens::cpu {

enum class Element : int { f32, f16, bf16 };

constexpr int64_t element_size(Element e) {
  return e == Element::f32 ? 4 : 2;
}

// A frozen matrix [rows, cols] as the kernels read it: dense in one of three element types, or MLX's affine format, where every group of
// `group_size` columns of a row shares a scale and a bias and codes are packed least significant bit first: w = scale * code + bias.
struct Matrix {
  int64_t rows;
  int64_t cols;
  Element element;  // of the values if dense, of scales and biases if quantised
  int bits;         // 0: dense
  int group_size;
  const void* values;  // dense values or packed codes
  const void* scales;
  const void* biases;
};

// The reduction is cut into blocks of this many terms, so that a packed panel stays in the L1/L2 cache. A multiple of every group size.
constexpr int64_t kReductionBlock = 256;

struct KernelTable {
  const char* name;

  // Columns of the output that one packed panel covers.
  int panel_width;

  // Widen n elements to float, or narrow n floats (to nearest even).
  void (*load)(Element, const void* from, float* to, int64_t n);
  void (*store)(Element, const float* from, void* to, int64_t n);

  // Pack a panel [depth, panel_width] of B as floats, zero beyond `width` columns.
  //   rows:    B = W^T; panel columns are rows of W from `column`, depth runs along W's columns from `start`
  //   columns: B = W;   panel columns are columns of W from `column`, depth runs along W's rows from `start`
  // For a quantised W, `start` (rows) and `column` (columns) are multiples of 8.
  void (*pack_rows)(const Matrix&, int64_t column, int64_t width, int64_t start, int64_t depth, float* panel);
  void (*pack_columns)(const Matrix&, int64_t column, int64_t width, int64_t start, int64_t depth, float* panel);

  // c[m, 0:width] = (accumulate ? c : 0) + a[m, 0:depth] panel, for all m < rows. lda and ldc are row strides in elements.
  void (*multiply)(
      const float* a, int64_t lda, int64_t rows, const float* panel, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate);
};

// The widest instruction set that this CPU has, or the one named by METALENS_ISA. Throws std::runtime_error if that name is unknown or the CPU
// lacks it. Decided once.
const KernelTable& kernels();

// Names of the instruction sets that this build holds and this CPU has, narrowest first, separated by spaces.
const char* available_isas();

}  // namespace metalens::cpu
