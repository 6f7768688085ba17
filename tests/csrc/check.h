// Common parts of the check programs: random numbers that are the same on every machine, frozen matrices in buffers of exactly their size together
// with their values in double precision, and comparisons that name the case that failed. test_sanitizers.py and test_neon.py build the programs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/precision.h"

namespace check {

using namespace metalens::cpu;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline uint32_t next_random() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}

// In [-0.5, 0.5).
inline float uniform() {
  return float(next_random() >> 8) / float(1 << 24) - 0.5f;
}

// Mean 0, variance 1, approximately normal.
inline float normal() {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

inline std::vector<float> normals(int64_t n, float scale) {
  std::vector<float> v(n);
  for (float& x : v) x = scale * normal();
  return v;
}

// The case under check, for the report.
inline char current_case[200];
inline int failures = 0, failures_of_case = 0;

inline void begin(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(current_case, sizeof(current_case), format, arguments);
  va_end(arguments);
  failures_of_case = 0;
}

inline void expect(bool right, const char* what, int64_t at, double got, double wanted, double tolerance) {
  if (right) return;
  ++failures;
  if (++failures_of_case == 1) std::printf("%s: %s[%ld] is %.9g instead of %.9g +- %.2g\n", current_case, what, long(at), got, wanted, tolerance);
}

// NaN is near NaN only, and infinity is near itself.
inline void near(const char* what, int64_t at, double got, double wanted, double tolerance) {
  expect(std::isnan(wanted) ? std::isnan(got) : got == wanted || std::abs(got - wanted) <= tolerance, what, at, got, wanted, tolerance);
}

inline void equal(const char* what, int64_t at, double got, double wanted) {
  near(what, at, got, wanted, 0);
}

struct Storage {
  Format format;
  int bits;  // 0: dense
  int group;
  Element element;
};

inline const Storage kDense{Format::dense, 0, 0, Element::f32};

// The value of an e4m3 code. Random codes are kept within a little more than half of its range, without NaN, and scales of every format within a few
// powers of two of 1.
inline double e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 128 ? -magnitude : magnitude;
}

inline double e2m1(uint8_t code) {
  constexpr double magnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
}

// Write one random number of an element type to `to` and return its value.
inline double random_element(Element element, void* to) {
  if (element == Element::f16) {
    const uint32_t mantissa = next_random() >> 22, exponent = 10 + (next_random() >> 30), sign = next_random() >> 31;
    const uint16_t bits = uint16_t(sign << 15 | exponent << 10 | mantissa);
    std::memcpy(to, &bits, 2);
    return (sign ? -1 : 1) * std::ldexp(1024 + mantissa, int(exponent) - 25);
  }
  float value = uniform();
  if (element == Element::f32) {
    std::memcpy(to, &value, 4);
    return value;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  const uint16_t high = uint16_t(bits >> 16);
  std::memcpy(to, &high, 2);
  return value;
}

// A random matrix [rows, cols].
class Frozen {
 public:
  Frozen(int64_t rows, int64_t cols, Storage storage) : storage_(storage), rows_(rows), cols_(cols), values_(rows * cols), sizes_(rows * cols) {
    const int64_t n = rows * cols, size = element_size(storage.element);
    if (storage.format == Format::dense) {
      packed_.resize(n * size);
      for (int64_t i = 0; i < n; ++i) sizes_[i] = std::abs(values_[i] = random_element(storage.element, packed_.data() + i * size));
      return;
    }
    const bool affine = storage.format == Format::affine;
    packed_.resize(n * storage.bits / 8);
    scales_.resize(n / storage.group * (affine ? size : 1));
    biases_.resize(affine ? scales_.size() : 0);
    double scale = 0, bias = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (i % storage.group == 0) {
        const int64_t group = i / storage.group;
        if (affine) {
          scale = random_element(storage.element, scales_.data() + group * size);
          bias = random_element(storage.element, biases_.data() + group * size);
        } else if (storage.format == Format::nvfp4) {
          scale = e4m3(scales_[group] = uint8_t(next_random() >> 24) & 0xbf);
        } else {
          scale = std::ldexp(1, (scales_[group] = uint8_t(124 + (next_random() >> 29))) - 127);
        }
      }
      uint32_t code = next_random() >> (32 - storage.bits);
      if (storage.format == Format::mxfp8) code &= 0xbf;  // below 2, and never NaN
      for (int bit = 0; bit < storage.bits; ++bit) {
        const int64_t at = i * storage.bits + bit;
        packed_[at / 8] |= uint8_t((code >> bit & 1) << at % 8);
      }
      const double number = affine ? code : storage.format == Format::mxfp8 ? e4m3(uint8_t(code)) : e2m1(uint8_t(code));
      values_[i] = scale * number + bias;
      sizes_[i] = std::abs(scale * number) + std::abs(bias);
    }
  }

  Matrix matrix() const {
    return {rows_, cols_, storage_.element, storage_.format, storage_.bits, storage_.group, packed_.data(), scales_.data(), biases_.data()};
  }
  double at(int64_t row, int64_t column) const {
    return values_[row * cols_ + column];
  }
  // The magnitude that errors are relative to: |scale * code| + |bias|, without cancellation.
  double size_at(int64_t row, int64_t column) const {
    return sizes_[row * cols_ + column];
  }
  double rms() const {
    double sum = 0;
    for (double v : values_) sum += v * v;
    return std::sqrt(sum / double(values_.size()));
  }

 private:
  Storage storage_;
  int64_t rows_, cols_;
  std::vector<uint8_t> packed_, scales_, biases_;
  std::vector<double> values_, sizes_;
};

// The error of a product relative to the sum of its terms' magnitudes.
inline double unit(Precision precision) {
  return precision == Precision::bf16 && kernels().bf16 ? 1.0 / 128 : 4e-6;
}

// The precisions that differ here: if 16-bit operands are no faster, both compute the same.
inline std::vector<Precision> precisions() {
  return kernels().bf16 ? std::vector{Precision::float32, Precision::bf16} : std::vector{Precision::float32};
}

inline int result() {
  if (failures) std::printf("%d values are wrong under %s\n", failures, kernels().name);
  return failures ? 1 : 0;
}

}  // namespace check
