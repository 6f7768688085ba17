// The CPU kernels' contract: what every instruction set implements, and how one is chosen at run time.
//
// One source (isa/*.inc) is compiled once per instruction set, each in a translation unit with its own flags. A unit exports nothing but its table,
// and includes no header with inline code of ours or of the standard library, so the linker can never pick a wide copy of a shared function.
#pragma once

#include <cstdint>

namespace metalens::cpu {

enum class Element : int { f32, f16, bf16 };

constexpr int64_t element_size(Element e) {
  return e == Element::f32 ? 4 : 2;
}

// How a frozen matrix is stored. Codes are packed least significant bit first; every group of `group_size` columns of a row shares one scale.
//   affine  w = scale * code + bias; codes of 2-6 or 8 bits, scales and biases in `element`
//   mxfp4   w = 2^(scale - 127) * e2m1(code), groups of 32;  mxfp8: e4m3(code)
//   nvfp4   w = e4m3(scale) * e2m1(code), groups of 16
enum class Format : int { dense, affine, mxfp4, mxfp8, nvfp4 };

// A frozen matrix [rows, cols] as the kernels read it.
struct Matrix {
  int64_t rows;
  int64_t cols;
  Element element;  // of the values if dense, of scales and biases if affine
  Format format;
  int bits;
  int group_size;
  const void* values;  // dense values or packed codes
  const void* scales;
  const void* biases;
};

// The reduction is cut into blocks of this many terms, so that a packed panel stays in the L1/L2 cache. A multiple of every group size.
constexpr int64_t kReductionBlock = 256;

// Up to this many rows, a product with a frozen matrix unpacks each weight in registers; beyond, panels that all rows share pay.
constexpr int64_t kFewRows = 4;

// A register-tile product: [rows, depth] packed as `left`, times [depth, panel_width] packed as `panel`. The layouts are the implementation's own, so
// that one tile-level algorithm serves float32 vectors and 16-bit matrix units alike. depth <= kReductionBlock throughout.
struct Multiplier {
  int panel_width;  // columns of the output that one panel covers
  int64_t (*left_bytes)(int64_t rows, int64_t depth);
  int64_t panel_bytes;

  void (*pack_left)(const float* a, int64_t lda, int64_t rows, int64_t depth, void* left);

  // Pack a panel [depth, panel_width] of B; columns beyond `width` hold anything.
  //   rows:    B = W^T; panel columns are rows of W from `column`, depth runs along W's columns from `start`
  //   columns: B = W;   panel columns are columns of W from `column`, depth runs along W's rows from `start`
  // For a quantized W, `start` (rows) and `column` (columns) are multiples of 8.
  void (*pack_rows)(const Matrix&, int64_t column, int64_t width, int64_t start, int64_t depth, void* panel);
  void (*pack_columns)(const Matrix&, int64_t column, int64_t width, int64_t start, int64_t depth, void* panel);

  // c[m, 0:width] = (accumulate ? c : 0) + left[m, :] panel, for all m < rows.
  void (*multiply)(const void* left, int64_t rows, const void* panel, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate);
};

// A row's softmax over the vocabulary seen so far, relative to its largest logit.
struct SoftmaxSums {
  float top;      // the largest logit, -inf at the start
  int64_t best;   // the first id that has it, -1 at the start
  double sum;     // of exp(z - top)
  double moment;  // of exp(z - top) (z - top)
};

// Sums of g = e - p over the vocabulary, where e = exp(lp + d - shift) and p = exp(lp): see lens_kl.h.
struct DeltaSums {
  double excess;     // of g
  double linear;     // of p (d - shift)
  double curvature;  // of g - p (d - shift), every term of which is positive
  float top;         // the largest lp + d - shift where d - shift is so large that e may overflow; else -inf
};

// What a norm divided a row by: x = (y - mean) * inverse.
struct RowMoments {
  float mean;
  float inverse;
};

struct KernelTable {
  const char* name;
  Multiplier float32;
  const Multiplier* bf16;  // 16-bit operands, float32 sums; null where that is no faster

  // Widen n elements to float, or narrow n floats (to nearest even).
  void (*load)(Element, const void* from, float* to, int64_t n);
  void (*store)(Element, const float* from, void* to, int64_t n);

  // For rows <= kFewRows: out[r, j] = x[r, :] . w[first + j, :] for j < count.
  void (*few_rows)(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo);
  // For rows <= kFewRows: out[r, :] = sum of x[r, v] w[first + v, :] over v < count.
  void (*few_columns)(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo);

  // z = softcap(scale * (z + bias)); bias may be null, softcap 0 for none. softcap(t) = c tanh(t / c).
  void (*transform)(float* z, const float* bias, int64_t n, float scale, float softcap);

  // Add the logits z of ids first ... first + n - 1. If `weights` is given (it may be z), it receives exp(z - top) under the new top. Returns the
  // factor by which the row's earlier weights have shrunk.
  float (*softmax_add)(const float* z, int64_t first, int64_t n, SoftmaxSums& sums, float* weights);

  // sum of weights * (a - b) where the weight is not 0.
  double (*weighted_difference)(const float* weights, const float* a, const float* b, int64_t n);

  // How many of z exceed the bound.
  int64_t (*count_above)(const float* z, int64_t n, float bound);

  // The model's own row: lp = z - lse, p = exp(lp); z is replaced by lp.
  void (*log_probabilities)(float* z, float lse, int64_t n, float* p);

  // d, the difference of the heads' products, becomes the difference of the logits: scale * d for a linear head. With a softcap, `model` holds the
  // model's logits before it, and `slope` receives the derivative of the softcap at the lens's logit.
  void (*delta_transform)(float* d, const float* model, int64_t n, float scale, float softcap, float* slope);

  // g = p (exp(d - shift) - 1) in place of d, and its sums. `slope`, if given, multiplies g afterward.
  void (*delta_add)(float* d, const float* lp, const float* p, const float* slope, int64_t n, float shift, DeltaSums& sums);

  // out = gate / (1 + exp(-gate)) * x; out may be either.
  void (*swiglu)(const float* gate, const float* x, int64_t n, float* out);

  // n = gain * y / rms(y) + bias, with `center` of y - mean(y): RMSNorm and LayerNorm. gain and bias may be null.
  RowMoments (*normalize)(const float* y, const float* gain, const float* bias, int64_t d, float eps, bool center, float* n);
  // The gradient at y from that at n; dy may be dn.
  void (*normalize_backward)(const float* y, const float* gain, const float* dn, int64_t d, RowMoments moments, bool center, float* dy);
};

// The widest instruction set that this CPU has, or the one named by METALENS_ISA. Throws std::runtime_error if that name is unknown or the CPU
// lacks it. Decided once.
const KernelTable& kernels();

// Names of the instruction sets that this build holds and this CPU has, narrowest first, separated by spaces.
const char* available_isas();

}  // namespace metalens::cpu
