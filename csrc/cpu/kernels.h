// The contract of the CPU kernels: what every instruction set implements, and how one is chosen at run time.
//
// One source (isa/*.h) is compiled once per instruction set, each time in a translation unit (isa/*.cpp) with its own flags. All code of a unit lies
// in a namespace of its own, and a unit includes no header with inline code of the standard library or of ours outside isa/. So no function with wide
// instructions shares a symbol with another unit, and the linker can never pick it for a narrower machine. Other code sees only a unit's table.
#pragma once

#include <cstdint>

namespace metalens::cpu {

enum class Element : int { f32, f16, bf16 };

constexpr int64_t element_size(Element e) {
  return e == Element::f32 ? 4 : 2;
}

// The storage format of a frozen matrix. Codes are packed least significant bit first; each group of `group_size` columns of a row shares a scale.
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

// Terms in a block of the reduction, at most, so that a packed panel stays in the L1/L2 cache. A multiple of every group size. Each block reads and
// writes all sums once more, and short blocks do so after little work: the reductions of small models (576, 640) should fit one.
constexpr int64_t kReductionBlock = 640;

// Up to this many rows, a product with a frozen matrix unpacks each weight in registers (matvec). With more rows it pays to unpack panels that all
// rows share.
constexpr int64_t kMatvecRows = 4;

// A register-tile product: [rows, depth] packed as `left`, times [depth, panel_width] packed as `panel`. The layouts belong to the implementation, so
// that one tile-level algorithm serves both float32 vectors and 16-bit matrix units. In every function depth <= kReductionBlock.
struct Multiplier {
  int panel_width;  // columns of the output that one panel covers
  int64_t (*left_bytes)(int64_t rows, int64_t depth);
  int64_t panel_bytes;

  void (*pack_left)(const float* a, int64_t lda, int64_t rows, int64_t depth, void* left);

  // Pack a panel [depth, panel_width] of B; columns beyond `width` are undefined.
  //   rows:    B = W^T; panel columns are rows of W from `column`, depth runs along W's columns from `start`
  //   columns: B = W;   panel columns are columns of W from `column`, depth runs along W's rows from `start`
  // For a quantized W, `start` (rows) and `column` (columns) are multiples of 8.
  void (*pack_rows)(const Matrix&, int64_t column, int64_t width, int64_t start, int64_t depth, void* panel);
  void (*pack_columns)(const Matrix&, int64_t column, int64_t width, int64_t start, int64_t depth, void* panel);

  // c[m, 0:width] = (accumulate ? c : 0) + left[m, :] panel, for all m < rows.
  void (*multiply)(const void* left, int64_t rows, const void* panel, int64_t depth, float* c, int64_t ldc, int64_t width, bool accumulate);
};

// The softmax of a row over the part of the vocabulary seen so far, relative to its largest logit.
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
  float top;         // the largest lp + d - shift of the ids whose d - shift is so large that e may overflow; -inf if there are none
};

// Sums over the vocabulary that compare two predictions p = exp(a - lse_a) and q = exp(b - lse_b). Every term is positive, and 0 where p = q, so an
// error e of a normalizer changes the sums of nearly equal predictions by e^2, and those of others in proportion.
struct CompareSums {
  double kl;          // of q - p - p log(q / p)
  double reverse_kl;  // of p - q - q log(p / q)
  double js;          // of p log(2 p / (p + q)) + q log(2 q / (p + q))
  double difference;  // of |p - q|
};

// The statistics by which a norm standardized a row: x = (y - mean) * inverse.
struct RowMoments {
  float mean;
  float inverse;
};

struct KernelTable {
  const char* name;
  Multiplier float32;
  const Multiplier* bf16;  // 16-bit operands, float32 sums; null if that is no faster

  // Widen n elements to float, or narrow n floats (to nearest even).
  void (*load)(Element, const void* from, float* to, int64_t n);
  void (*store)(Element, const float* from, void* to, int64_t n);

  // to[j, i] = from[i, j] for i < rows and j < columns; ldf and ldt are row strides.
  void (*transpose_block)(const float* from, int64_t ldf, int64_t rows, int64_t columns, float* to, int64_t ldt);

  // For rows <= kMatvecRows: out[r, j] = x[r, :] . w[first + j, :] for j < count.
  void (*matvec_rows)(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo);
  // For rows <= kMatvecRows: out[r, :] = sum of x[r, v] w[first + v, :] over v < count.
  void (*matvec_columns)(const Matrix& w, int64_t first, int64_t count, const float* x, int64_t ldx, int64_t rows, float* out, int64_t ldo);

  // z = softcap(scale * (z + bias)); bias may be null, softcap 0 for none. softcap(t) = c tanh(t / c).
  void (*transform)(float* z, const float* bias, int64_t n, float scale, float softcap);

  // Add the logits z of ids first ... first + n - 1 to `sums`. `weights`, if not null (it may be z), receives exp(z - top) with the new top. Returns
  // the factor that rescales the row's earlier weights to the new top.
  float (*softmax_add)(const float* z, int64_t first, int64_t n, SoftmaxSums& sums, float* weights);

  // The sum of weights * (a - b) over the elements whose weight is not 0.
  double (*weighted_difference)(const float* weights, const float* a, const float* b, int64_t n);

  // Add the terms of ids with the logits a and b to `sums`.
  void (*compare_add)(const float* a, const float* b, int64_t n, float lse_a, float lse_b, CompareSums& sums);

  // The number of elements of z above the bound.
  int64_t (*count_above)(const float* z, int64_t n, float bound);

  // For the model's own row: lp = z - lse replaces z, and p = exp(lp).
  void (*log_probabilities)(float* z, float lse, int64_t n, float* p);

  // Turn d, the difference of two products with the head, into the difference of the logits: scale * d for a linear head. With a softcap, `model`
  // holds the model's logits before the softcap, and `slope` receives the derivative of the softcap at the lens's logit.
  void (*delta_transform)(float* d, const float* model, int64_t n, float scale, float softcap, float* slope);

  // g = p (exp(d - shift) - 1) replaces d, and its sums are added to `sums`. `slope`, if not null, then multiplies g.
  void (*delta_add)(float* d, const float* lp, const float* p, const float* slope, int64_t n, float shift, DeltaSums& sums);

  // out = gate / (1 + exp(-gate)) * x; out may be gate or x.
  void (*swiglu)(const float* gate, const float* x, int64_t n, float* out);

  // out = a + b, and out = a * b; out may be a or b.
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  void (*multiply_elements)(const float* a, const float* b, int64_t n, float* out);
  // out = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; out may be x.
  void (*gelu_tanh)(const float* x, int64_t n, float* out);
  // Rotate `half` pairs (a, b) to (a cos - b sin, b cos + a sin). They are neighbors, or else x[i] and x[half + i]. out may be x.
  void (*rotate)(const float* x, const float* cosines, const float* sines, int64_t half, bool neighbors, float* out);

  // n = gain * x / rms(x) + bias. RMSNorm takes x = y; LayerNorm, with `center`, takes x = y - mean(y). gain and bias may be null.
  RowMoments (*normalize)(const float* y, const float* gain, const float* bias, int64_t d, float eps, bool center, float* n);
  // The gradient at y from the gradient at n; dy may be dn.
  void (*normalize_backward)(const float* y, const float* gain, const float* dn, int64_t d, RowMoments moments, bool center, float* dy);
};

// The kernels of the widest instruction set that this CPU has, or of the one that METALENS_ISA names. Chosen once. Throws std::runtime_error if that
// name is unknown or the CPU lacks it.
const KernelTable& kernels();

// The instruction sets that are in this build and on this CPU: names, narrowest first, separated by spaces.
const char* available_isas();

}  // namespace metalens::cpu
