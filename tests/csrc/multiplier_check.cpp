// Compares a unit's Multipliers with a double-precision product; test_multipliers.py builds it with the unit. On a wrong value it names the case and
// exits 1.
//
// The reference takes the operands as the product promises to take them: rounded to bfloat16, by code of its own, or as given. So the tolerance is
// only that of float32 sums. Guards around every buffer hold a pattern that must survive. The pattern reads as NaN, so a product that includes it
// shows it. If AddressSanitizer is on, it ends the program on any access to the guards of packed operands.
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "check.h"

using namespace check;

namespace metalens::cpu::METALENS_CHECKED_ISA {
extern const KernelTable table;
}

namespace {

// ---- Random matrices and their values

// Round x to `bits` bits of mantissa, to nearest even, by arithmetic. Not for subnormal numbers.
double round_to_bits(double x, int bits) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, bits)), exponent - bits);
}

void append(std::vector<uint8_t>& bytes, const void* value, size_t size) {
  const auto* p = static_cast<const uint8_t*>(value);
  bytes.insert(bytes.end(), p, p + size);
}

// Append x to bytes as an element, and return the value that it then has.
float store_element(std::vector<uint8_t>& bytes, Element e, float x) {
  if (e == Element::f16) {
    const _Float16 h = _Float16(x);
    append(bytes, &h, 2);
    return float(h);
  }
  if (e == Element::bf16) {
    const float rounded = float(round_to_bits(x, 8));
    append(bytes, reinterpret_cast<const uint8_t*>(&rounded) + 2, 2);
    return rounded;
  }
  append(bytes, &x, 4);
  return x;
}

struct Kind {
  Format format;
  int bits;
  int group;
  Element element;

  std::string name() const {
    static const char* const formats[] = {"dense", "affine", "mxfp4", "mxfp8", "nvfp4"};
    static const char* const elements[] = {"f32", "f16", "bf16"};
    return std::string(formats[int(format)]) + " " + std::to_string(bits) + " bits, groups of " + std::to_string(group) + ", " +
           elements[int(element)];
  }
};

// A random matrix in exactly sized buffers, and its values. Frozen does not serve here: its scales may have as many bits as a float, so the rounding
// of scale * code + bias in the kernels would decide which bfloat16 results.
struct Weight {
  Kind kind;
  int64_t rows, cols;
  std::vector<uint8_t> values, scales, biases;
  std::vector<float> dense;

  Weight(Kind kind, int64_t rows, int64_t cols) : kind(kind), rows(rows), cols(cols), dense(rows * cols) {
    if (kind.format == Format::dense) {
      for (float& v : dense) v = store_element(values, kind.element, uniform());
    } else {
      quantize();
    }
    // Exactly sized, so that AddressSanitizer sees an access beyond.
    for (auto* buffer : {&values, &scales, &biases}) buffer->shrink_to_fit();
  }

  Matrix matrix() const {
    return {rows, cols, kind.element, kind.format, kind.bits, kind.group, values.data(), scales.data(), biases.data()};
  }

 private:
  void quantize() {
    values.resize(dense.size() * kind.bits / 8);
    float scale = 0, bias = 0;
    for (size_t i = 0; i < dense.size(); ++i) {
      if (i % kind.group == 0) next_group(scale, bias);
      const uint32_t code = next_code();
      for (int bit = 0; bit < kind.bits; ++bit) {
        const size_t at = i * kind.bits + bit;
        values[at / 8] |= uint8_t((code >> bit & 1) << at % 8);
      }
      // The product is exact, so only one rounding follows, with or without a fused multiply-add.
      dense[i] = float(double(scale) * number(code) + bias);
    }
  }

  void next_group(float& scale, float& bias) {
    if (kind.format == Format::affine) {
      scale = store_element(scales, kind.element, float(round_to_bits(uniform() / (1 << (kind.bits - 1)), 8)));
      bias = store_element(biases, kind.element, float(round_to_bits(uniform(), 8)));
    } else if (kind.format == Format::nvfp4) {
      scales.push_back(uint8_t((next_random() >> 8) % 0x7f));
      scale = float(e4m3(scales.back()));
    } else {
      scales.push_back(uint8_t(120 + (next_random() >> 8) % 14));
      scale = std::ldexp(1.0f, scales.back() - 127);
    }
  }

  uint32_t next_code() const {
    const uint32_t code = next_random() >> (32 - kind.bits);
    return kind.format == Format::mxfp8 && (code & 127) == 127 ? 0 : code;  // not NaN
  }

  float number(uint32_t code) const {
    if (kind.format == Format::affine) return float(code);
    return float(kind.format == Format::mxfp8 ? e4m3(uint8_t(code)) : e2m1(uint8_t(code)));
  }
};

// ---- Guarded buffers

constexpr int64_t kGuard = 256;

[[noreturn]] void fail(const std::string& message) {
  std::printf("%s\n", message.c_str());
  std::exit(1);
}

// A buffer of bytes 0xff between guards, aligned like a Buffer.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : bytes_(bytes), all_(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 2 * kGuard + 63) / 64 * 64))) {
    std::memset(all_, 0xff, bytes + 2 * kGuard);
    ASAN_POISON_MEMORY_REGION(all_, kGuard);
    ASAN_POISON_MEMORY_REGION(all_ + kGuard + bytes, kGuard);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(all_, bytes_ + 2 * kGuard);
    for (int64_t i = 0; i < kGuard; ++i) {
      if (all_[i] != 0xff || all_[kGuard + bytes_ + i] != 0xff) fail("a guard of " + std::to_string(bytes_) + " packed bytes was written");
    }
    std::free(all_);
  }

  void* data() const {
    return all_ + kGuard;
  }

 private:
  int64_t bytes_;
  uint8_t* all_;
};

// ---- Checks

// How a Multiplier rounds its operands.
struct Promise {
  const char* name;
  int bits;          // of mantissa that operands are rounded to
  double tolerance;  // relative to the sum of the terms' magnitudes
};

struct Shape {
  bool transpose;
  int64_t column, width, start, depth;

  std::string name() const {
    return std::string(transpose ? "rows" : "columns") + " " + std::to_string(column) + " + " + std::to_string(width) + ", depth " +
           std::to_string(start) + " + " + std::to_string(depth);
  }
};

constexpr int64_t kMostRows = 70;

// The product left B for all rows, and the sums of the terms' magnitudes.
struct Reference {
  std::vector<double> sums, magnitudes;

  Reference(const Weight& w, const Shape& s, const std::vector<float>& a, int bits) : sums(kMostRows * s.width), magnitudes(sums.size()) {
    std::vector<double> rounded(a.begin(), a.end());
    for (double& v : rounded) v = round_to_bits(v, bits);
    for (int64_t k = 0; k < s.depth; ++k) {
      for (int64_t j = 0; j < s.width; ++j) {
        const int64_t row = s.transpose ? s.column + j : s.start + k, col = s.transpose ? s.start + k : s.column + j;
        const double b = round_to_bits(w.dense[row * w.cols + col], bits);
        for (int64_t m = 0; m < kMostRows; ++m) {
          const double term = rounded[m * s.depth + k] * b;
          sums[m * s.width + j] += term;
          magnitudes[m * s.width + j] += std::abs(term);
        }
      }
    }
  }
};

void pack_panel(const Multiplier& multiplier, const Weight& w, const Shape& s, void* panel) {
  (s.transpose ? multiplier.pack_rows : multiplier.pack_columns)(w.matrix(), s.column, s.width, s.start, s.depth, panel);
}

// The product of the first `rows` rows of a, row stride lda. Each row of the result has kMargin guards on the right, and kMargin rows of guards lie
// before and behind them.
class Product {
 public:
  static constexpr float kCanary = 12345.0f;
  static constexpr int64_t kMargin = 3;

  Product(const Multiplier& multiplier, const float* a, int64_t lda, int64_t rows, const Shape& s, const void* panel, const float* initial)
      : width_(s.width), ldc_(s.width + kMargin), c_((rows + 2 * kMargin) * ldc_, kCanary) {
    Guarded left(multiplier.left_bytes(rows, s.depth));
    multiplier.pack_left(a, lda, rows, s.depth, left.data());
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = 0; j < width_; ++j) c_[(kMargin + m) * ldc_ + j] = initial ? initial[m * width_ + j] : NAN;
    }
    multiplier.multiply(left.data(), rows, panel, s.depth, c_.data() + kMargin * ldc_, ldc_, width_, initial != nullptr);
    for (size_t i = 0; i < c_.size(); ++i) {
      const int64_t m = int64_t(i) / ldc_ - kMargin;
      const bool inside = m >= 0 && m < rows && int64_t(i) % ldc_ < width_;
      if (!inside && c_[i] != kCanary) fail("rows " + std::to_string(rows) + ", " + s.name() + ": written beside row " + std::to_string(m));
    }
  }

  float at(int64_t m, int64_t j) const {
    return c_[(kMargin + m) * ldc_ + j];
  }

  bool same_row(int64_t m, const Product& other, int64_t other_row) const {
    return std::memcmp(&c_[(kMargin + m) * ldc_], &other.c_[(kMargin + other_row) * ldc_], width_ * sizeof(float)) == 0;
  }

 private:
  int64_t width_, ldc_;
  std::vector<float> c_;
};

double worst = 0;

void check_values(const Multiplier& multiplier, const Promise& promise, const Weight& w, const Shape& s, bool all_rows) {
  std::vector<float> a(kMostRows * s.depth), initial(kMostRows * s.width);
  for (float& v : a) v = uniform();
  for (float& v : initial) v = uniform();
  const Reference reference(w, s, a, promise.bits);
  Guarded panel(multiplier.panel_bytes);
  pack_panel(multiplier, w, s, panel.data());
  const std::vector<int64_t> row_counts = all_rows ? std::vector<int64_t>{1, 5, 16, 17, 33, kMostRows} : std::vector<int64_t>{33};
  for (const int64_t rows : row_counts) {
    for (const bool accumulate : {false, true}) {
      const Product product(multiplier, a.data(), s.depth, rows, s, panel.data(), accumulate ? initial.data() : nullptr);
      for (int64_t i = 0; i < rows * s.width; ++i) {
        const double before = accumulate ? initial[i] : 0, expected = before + reference.sums[i];
        const float got = product.at(i / s.width, i % s.width);
        const double error = std::abs(got - expected) / (reference.magnitudes[i] + std::abs(before) + 1e-30);
        if (error > worst) worst = error;
        if (!(error <= promise.tolerance)) {
          fail(
              std::string(promise.name) + ", " + w.kind.name() + ", " + s.name() + ", rows " + std::to_string(rows) + ", accumulate " +
              std::to_string(accumulate) + ": at " + std::to_string(i / s.width) + ", " + std::to_string(i % s.width) + " " + std::to_string(got) +
              " instead of " + std::to_string(expected));
        }
      }
    }
  }
}

// A row gives the same bits alone as among others, for one column as for all columns, and whatever the other rows hold.
void check_independence(const Multiplier& multiplier, const Weight& w) {
  const Shape s{true, 0, multiplier.panel_width, 0, w.cols};
  const Shape one{true, 5, 1, 0, w.cols};
  std::vector<float> a(kMostRows * s.depth);
  for (float& v : a) v = uniform();
  Guarded panel(multiplier.panel_bytes), column(multiplier.panel_bytes);
  pack_panel(multiplier, w, s, panel.data());
  pack_panel(multiplier, w, one, column.data());
  const Product clean(multiplier, a.data(), s.depth, kMostRows, s, panel.data(), nullptr);
  for (const int64_t m : {0, 15, 16, 31, 69}) {
    const float* row = a.data() + m * s.depth;
    const Product alone(multiplier, row, s.depth, 1, s, panel.data(), nullptr);
    if (!clean.same_row(m, alone, 0)) fail(w.kind.name() + ": a row alone differs from that row among others");
    const Product element(multiplier, row, s.depth, 1, one, column.data(), nullptr);
    if (element.at(0, 0) != clean.at(m, 5)) fail(w.kind.name() + ": a column alone differs from that column among others");
  }
  a[0] = NAN;
  a[17 * s.depth + s.depth - 1] = INFINITY;
  a[68 * s.depth + 1] = -INFINITY;
  const Product product(multiplier, a.data(), s.depth, kMostRows, s, panel.data(), nullptr);
  for (int64_t m = 0; m < kMostRows; ++m) {
    const bool expected_finite = m != 0 && m != 17 && m != 68;
    if (expected_finite && !product.same_row(m, clean, m)) fail(w.kind.name() + ": NaN or infinity reached row " + std::to_string(m));
    if (!expected_finite && std::isfinite(product.at(m, 0))) fail(w.kind.name() + ": NaN or infinity was lost in row " + std::to_string(m));
  }
}

// A NaN in B reaches all of its column and no other.
void check_nan_column(const Multiplier& multiplier) {
  Weight w({Format::dense, 32, 1, Element::f32}, 40, 50);
  const float nan = NAN;
  std::memcpy(w.values.data() + (7 * w.cols + 3) * sizeof(float), &nan, sizeof(float));
  const Shape s{true, 0, multiplier.panel_width, 0, w.cols};
  std::vector<float> a(kMostRows * s.depth, 1.0f);
  Guarded panel(multiplier.panel_bytes);
  pack_panel(multiplier, w, s, panel.data());
  const Product product(multiplier, a.data(), s.depth, kMostRows, s, panel.data(), nullptr);
  for (int64_t m = 0; m < kMostRows; ++m) {
    for (int64_t j = 0; j < s.width; ++j) {
      if (std::isnan(product.at(m, j)) != (j == 7)) fail("NaN in column 7 of B: column " + std::to_string(j) + " is wrong");
    }
  }
}

// Rounds values halfway between two bfloat16 numbers, NaN with payloads, and infinities. A product with 1 shows the rounded value.
void check_rounding(const Multiplier& multiplier) {
  const uint32_t patterns[] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0xbf808000, 0xbf818000, 0x7f7f7fff, 0x7f7fffff,
                               0x7f800000, 0xff800000, 0x7f800001, 0xffffffff, 0x7fc00000, 0x00800000, 0x80000000, 0x3fffffff};
  Weight identity({Format::dense, 32, 1, Element::f32}, 32, 32);
  for (int i = 0; i < 32 * 32; ++i) {
    const float v = i % 33 == 0;
    std::memcpy(identity.values.data() + i * sizeof(float), &v, sizeof(float));
  }
  const Shape s{false, 0, 16, 0, 32};
  Guarded panel(multiplier.panel_bytes);
  pack_panel(multiplier, identity, s, panel.data());
  for (const uint32_t pattern : patterns) {
    float value;
    std::memcpy(&value, &pattern, sizeof(value));
    const float expected = std::isfinite(value) ? float(round_to_bits(value, 8)) : value;
    std::vector<float> a(32);
    a[9] = value;
    const float got = Product(multiplier, a.data(), 32, 1, s, panel.data(), nullptr).at(0, 9);
    if (std::isnan(expected) ? !std::isnan(got) : got != expected) {
      fail("rounding " + std::to_string(value) + " gives " + std::to_string(got) + " instead of " + std::to_string(expected));
    }
  }
}

std::vector<Kind> kinds() {
  std::vector<Kind> all;
  for (const Element e : {Element::f32, Element::f16, Element::bf16}) {
    all.push_back({Format::dense, 8 * int(element_size(e)), 1, e});
    for (const int group : {32, 64, 128}) all.push_back({Format::affine, 4, group, e});
  }
  for (const int bits : {2, 3, 5, 6, 8}) {
    for (const int group : {32, 64}) all.push_back({Format::affine, bits, group, Element::bf16});
  }
  all.push_back({Format::mxfp4, 4, 32, Element::f32});
  all.push_back({Format::mxfp8, 8, 32, Element::f32});
  all.push_back({Format::nvfp4, 4, 16, Element::f32});
  return all;
}

void check_kind(const Multiplier& multiplier, const Promise& promise, const Kind& kind) {
  const bool dense = kind.format == Format::dense;
  // Three and a half panels, and a little more than two blocks of the reduction, or the reverse.
  const Weight wide(kind, 67, dense ? 261 : 384), tall(kind, 263, dense ? 67 : 384);
  const int64_t full = multiplier.panel_width;
  for (const int64_t depth : {8, 16, 32, 40, 64, 250, 256}) {
    if (depth == 250 && !dense) continue;
    for (const int64_t width : {int64_t(1), int64_t(7), full}) {
      const bool all_rows = depth == 40;
      check_values(multiplier, promise, wide, {true, 0, width, 0, depth}, all_rows);
      check_values(multiplier, promise, wide, {true, 67 - width, width, dense ? 261 - depth : (384 - depth) / 16 * 8, depth}, false);
      check_values(multiplier, promise, tall, {false, 0, width, 0, depth}, all_rows);
      check_values(multiplier, promise, tall, {false, dense ? 67 - width : 8 * (1 + depth % 3), width, 263 - depth, depth - depth % 3}, false);
    }
  }
  // The matrix's last columns, which no access may pass, and a reduction that begins within a group.
  if (!dense) {
    check_values(multiplier, promise, wide, {true, 67 - (full - 5), full - 5, 384 - 232, 232}, false);
    check_values(multiplier, promise, tall, {false, 384 - full, full, 3, 33}, false);
    check_values(multiplier, promise, tall, {false, 384 - 8, 8, 262, 1}, false);
  }
  check_independence(multiplier, Weight(kind, 40, kind.group > 1 ? 128 : 77));
}

void check_multiplier(const Multiplier& multiplier, const Promise& promise) {
  worst = 0;
  for (const Kind& kind : kinds()) check_kind(multiplier, promise, kind);
  check_nan_column(multiplier);
  std::printf("%s: largest error %.2g of the terms' magnitudes\n", promise.name, worst);
}

}  // namespace

int main() {
#if defined(__linux__) && defined(__x86_64__)
  // Linux permits AMX tiles on request. Without AMX, or with tiles in software, the request fails, which does no harm.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#endif
  const KernelTable& table = METALENS_CHECKED_ISA::table;
  if (table.bf16) {
    check_multiplier(*table.bf16, {"bf16", 8, 1.5e-6});
    check_rounding(*table.bf16);
  }
#ifdef METALENS_SPLIT_FLOAT32
  // Relative to a term, the rounding of each second part loses at most 2^-17, and leaving out their product 2^-16.
  check_multiplier(table.float32, {"split float32", 24, 3.2e-5});
#else
  check_multiplier(table.float32, {"float32", 24, 1.5e-6});
#endif
  return 0;
}
