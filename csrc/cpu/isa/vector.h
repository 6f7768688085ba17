// Vectors of the unit's instruction set, and the exponential. The compiler's vector extension keeps one source valid for every target.
#pragma once

#include "cpu/kernels.h"

namespace metalens::cpu::METALENS_ISA {

using vec = float __attribute__((vector_size(METALENS_VECTOR * 4), aligned(4)));
using ivec = int32_t __attribute__((vector_size(METALENS_VECTOR * 4), aligned(4)));

// Unpacking works on eight codes at a time, whatever the vector's size: for every width of a code, eight codes fill a whole number of bytes.
using vec8 = float __attribute__((vector_size(32), aligned(4)));
using ivec8 = int32_t __attribute__((vector_size(32), aligned(4)));

constexpr int kVector = METALENS_VECTOR;

inline vec load_vec(const float* p) {
  return *reinterpret_cast<const vec*>(p);
}

inline void store_vec(float* p, vec v) {
  *reinterpret_cast<vec*>(p) = v;
}

inline vec8 load_vec8(const float* p) {
  return *reinterpret_cast<const vec8*>(p);
}

inline void store_vec8(float* p, vec8 v) {
  *reinterpret_cast<vec8*>(p) = v;
}

// The numbers of whole lanes. By halves where a vector of eight is no register: GCC would convert lane by lane.
inline vec8 floats_of(ivec8 v) {
  if constexpr (kVector >= 8) {
    return __builtin_convertvector(v, vec8);
  } else {
    using vec4 = float __attribute__((vector_size(16)));
    const vec4 low = __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), vec4);
    const vec4 high = __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), vec4);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  }
}

inline vec splat(float f) {
  return vec{} + f;
}

// Lane by lane the larger value. Where one of the two is NaN, the result is the other.
inline vec max(vec a, vec b) {
  return b > a ? b : a;
}

// The sum of a vector's lanes, by halves: a sum lane by lane takes as long as many products.
template <typename V>
inline float sum_of(V v) {
  if constexpr (sizeof(V) == 64) {
    return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (sizeof(V) == 32) {
    return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
  } else {
    return (v[0] + v[2]) + (v[1] + v[3]);
  }
}

inline bool any(ivec mask) {
  int32_t all = 0;
  for (int i = 0; i < kVector; ++i) all |= mask[i];
  return all != 0;
}

// Load the n < kVector values at the end of a row; the other lanes hold `padding`.
inline vec load_tail(const float* p, int64_t n, float padding) {
  vec v = splat(padding);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

inline void store_tail(float* p, int64_t n, vec v) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// The exponential functions are valid from kExpFloor to kExpCeiling. Below the floor exp(x) is subnormal, above the ceiling 2^n leaves float's range.
constexpr float kExpFloor = -87.3f;
constexpr float kExpCeiling = 88.0f;

// The parts of exp(x), with x = n ln 2 + r and |r| <= ln 2 / 2.
struct Exponential {
  vec scale;   // 2^n
  vec growth;  // exp(r) - 1, relative error 2.4e-8 before rounding
  vec curve;   // exp(r) - 1 - r
};

inline Exponential exponential(vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  const vec magic = splat(12582912.0f);
  const vec shifted = x * 1.44269504f + magic;
  const vec n = shifted - magic;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const ivec exponent = (reinterpret_cast<ivec>(shifted) << 23) + 0x3f800000;
  vec q = splat(0x1.6d4366p-10f);
  q = q * r + 0x1.120ba6p-7f;
  q = q * r + 0x1.5554e8p-5f;
  q = q * r + 0x1.5554dcp-3f;
  q = q * r + 0.5f;
  const vec curve = q * r * r;
  return {reinterpret_cast<vec>(exponent), curve + r, curve};
}

// exp(x) for x <= kExpCeiling, within 2 units in the last place; 0 below kExpFloor; NaN for NaN.
inline vec exp_vec(vec x) {
  const vec floor = splat(kExpFloor);
  const Exponential e = exponential(x < floor ? floor : x);
  const vec y = e.scale * e.growth + e.scale;
  return x < floor ? vec{} : y;
}

struct Hyperbolic {
  vec tanh;
  vec slope;  // 1 - tanh^2
};

// tanh(x) = (1 - e) / (1 + e) with e = exp(-2|x|), the numerator as expm1: relative error 3e-7. The slope is 4 e / (1 + e)^2, which stays exact
// where tanh rounds to 1.
inline Hyperbolic hyperbolic(vec x) {
  const vec negative = x < 0.0f ? x : -x;
  const vec twice = negative + negative;
  const vec floor = splat(-80.0f);  // above kExpFloor, and exp(-80) is nothing beside 1
  const Exponential e = exponential(twice < floor ? floor : twice);
  const vec minus_one = e.scale * e.growth + (e.scale - 1.0f);
  const vec sum = minus_one + 2.0f;
  const vec t = minus_one / sum;
  return {x < 0.0f ? t : -t, 4.0f * (e.scale * e.growth + e.scale) / (sum * sum)};
}

inline vec tanh_vec(vec x) {
  return hyperbolic(x).tanh;
}

}  // namespace metalens::cpu::METALENS_ISA
