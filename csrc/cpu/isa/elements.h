// Elements as they lie in memory: 16-bit floats and the codes of quantized matrices.
#pragma once

#include "cpu/isa/vector.h"

namespace metalens::cpu::METALENS_ISA {

#if defined(__aarch64__)
using half = __fp16;  // on Arm, gcc has _Float16 in C++ only from version 13
#else
using half = _Float16;
#endif

union Bits {
  float f;
  uint32_t u;
};

inline float widen_bf16(uint16_t h) {
  Bits b;
  b.u = uint32_t(h) << 16;
  return b.f;
}

inline uint16_t narrow_bf16(float f) {
  Bits b;
  b.f = f;
  const uint32_t rounded = (b.u + 0x7fffu + ((b.u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (b.u >> 16) | 0x40u;
  return uint16_t((b.u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float widen(Element e, const void* p, int64_t i) {
  switch (e) {
    case Element::f16:
      return float(static_cast<const half*>(p)[i]);
    case Element::bf16:
      return widen_bf16(static_cast<const uint16_t*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

void load(Element e, const void* from, float* to, int64_t n) {
  switch (e) {
    case Element::f16: {
      int64_t i = 0;
#ifdef __F16C__
      for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const half*>(from) + i))));
      }
#endif
      for (; i < n; ++i) to[i] = float(static_cast<const half*>(from)[i]);
      break;
    }
    case Element::bf16:
      for (int64_t i = 0; i < n; ++i) to[i] = widen_bf16(static_cast<const uint16_t*>(from)[i]);
      break;
    default:
      __builtin_memcpy(to, from, n * sizeof(float));
  }
}

void store(Element e, const float* from, void* to, int64_t n) {
  switch (e) {
    case Element::f16: {
      int64_t i = 0;
#ifdef __F16C__
      for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<half*>(to) + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
      }
#endif
      for (; i < n; ++i) static_cast<half*>(to)[i] = half(from[i]);
      break;
    }
    case Element::bf16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = narrow_bf16(from[i]);
      break;
    default:
      __builtin_memcpy(to, from, n * sizeof(float));
  }
}

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline const void* offset(const void* p, int64_t bytes) {
  return static_cast<const char*>(p) + bytes;
}

// The value of every code of e4m3 (8 bits, 4 of them the exponent; no infinities, NaN at 0x7f and 0xff) and of e2m1 (4 bits).
struct Tables {
  float e4m3[256];
  float e2m1[16];
};

constexpr float e4m3_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return __builtin_nanf("");
  float value = exponent ? float(8 + mantissa) : float(mantissa * 2);
  for (int i = 0; i < exponent; ++i) value *= 2;
  value /= 1024;  // 2^-7 for the exponent's bias, 2^-3 for the mantissa's bits
  return code & 128 ? -value : value;
}

constexpr Tables make_tables() {
  Tables t{};
  for (int i = 0; i < 256; ++i) t.e4m3[i] = e4m3_value(i);
  constexpr float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (int i = 0; i < 16; ++i) t.e2m1[i] = i & 8 ? -magnitudes[i & 7] : magnitudes[i & 7];
  return t;
}

constexpr Tables kTables = make_tables();

inline float e8m0_value(uint8_t code) {
  Bits b;
  b.u = code == 255 ? 0x7fc00000u : code ? uint32_t(code) << 23 : 0x00400000u;
  return b.f;
}

// Scale and bias of one group.
struct Group {
  float scale;
  float bias;
};

template <Format format>
inline Group group_at(const Matrix& w, int64_t index) {
  switch (format) {
    case Format::affine:
      return {widen(w.element, w.scales, index), widen(w.element, w.biases, index)};
    case Format::nvfp4:
      return {kTables.e4m3[static_cast<const uint8_t*>(w.scales)[index]], 0};
    default:
      return {e8m0_value(static_cast<const uint8_t*>(w.scales)[index]), 0};
  }
}

template <typename T>
inline uint64_t load_as(const uint8_t* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

// Eight codes of `bits` bits each, which fill `bits` bytes. They are read in whole loads: an odd number of bytes copied to the stack one by one would
// stall the load that follows.
template <int bits>
inline uint64_t eight_codes(const uint8_t* p) {
  if constexpr (bits == 2) return load_as<uint16_t>(p);
  if constexpr (bits == 3) return load_as<uint16_t>(p) | uint64_t(p[2]) << 16;
  if constexpr (bits == 4) return load_as<uint32_t>(p);
  if constexpr (bits == 5) return load_as<uint32_t>(p) | uint64_t(p[4]) << 32;
  if constexpr (bits == 6) return load_as<uint32_t>(p) | load_as<uint16_t>(p + 4) << 32;
  return load_as<uint64_t>(p);
}

// Eight codes, converted to numbers.
template <Format format, int bits>
inline vec8 codes8(const uint8_t* p) {
  if constexpr (format == Format::mxfp8) {
    vec8 v{};
    for (int i = 0; i < 8; ++i) v[i] = kTables.e4m3[p[i]];
    return v;
  } else if constexpr (format == Format::mxfp4 || format == Format::nvfp4) {
    vec8 v{};
    for (int i = 0; i < 8; ++i) v[i] = kTables.e2m1[p[i / 2] >> (i % 2 * 4) & 15];
    return v;
  } else if constexpr (bits <= 4) {
    const int32_t word = int32_t(eight_codes<bits>(p));
    constexpr ivec8 shifts = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    return floats_of(((ivec8{} + word) >> shifts) & ((1 << bits) - 1));
  } else {
    // Four codes fit a 32-bit lane for every width.
    const uint64_t word = eight_codes<bits>(p);
    const int32_t low = int32_t(word), high = int32_t(word >> (4 * bits));
    const ivec8 words = {low, low, low, low, high, high, high, high};
    constexpr ivec8 shifts = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
    return floats_of((words >> shifts) & ((1 << bits) - 1));
  }
}

// Call f with the matrix's format and width as template arguments: f.template operator()<format, bits>().
template <typename F>
inline void with_format(const Matrix& w, F f) {
  switch (w.format) {
    case Format::mxfp4:
      return f.template operator()<Format::mxfp4, 4>();
    case Format::mxfp8:
      return f.template operator()<Format::mxfp8, 8>();
    case Format::nvfp4:
      return f.template operator()<Format::nvfp4, 4>();
    default:
      break;
  }
  switch (w.bits) {
    case 2:
      return f.template operator()<Format::affine, 2>();
    case 3:
      return f.template operator()<Format::affine, 3>();
    case 4:
      return f.template operator()<Format::affine, 4>();
    case 5:
      return f.template operator()<Format::affine, 5>();
    case 6:
      return f.template operator()<Format::affine, 6>();
    default:
      return f.template operator()<Format::affine, 8>();
  }
}

// Write the values of columns [start, start + count) of one row to `out`; start and count are multiples of 8.
template <Format format, int bits>
inline void dequantize(const Matrix& w, int64_t row, int64_t start, int64_t count, float* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.values) + (row * w.cols + start) / 8 * bits;
  const int64_t groups = w.cols / w.group_size;
  for (int64_t i = 0; i < count;) {
    const int64_t group = (start + i) / w.group_size;
    const Group g = group_at<format>(w, row * groups + group);
    int64_t end = (group + 1) * w.group_size - start;
    if (end > count) end = count;
    for (; i < end; i += 8, codes += bits) store_vec8(out + i, codes8<format, bits>(codes) * g.scale + g.bias);
  }
}

// The same for a matrix of any format; for a dense one, start and count may be any.
void unpack(const Matrix& w, int64_t row, int64_t start, int64_t count, float* out) {
  if (w.format == Format::dense) {
    load(w.element, offset(w.values, (row * w.cols + start) * element_size(w.element)), out, count);
  } else {
    with_format(w, [&]<Format format, int bits>() { dequantize<format, bits>(w, row, start, count, out); });
  }
}

}  // namespace metalens::cpu::METALENS_ISA
