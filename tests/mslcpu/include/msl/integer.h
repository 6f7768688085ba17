// <metal_integer>, and the integer overloads of <metal_common>. Ends with the fast:: and precise:: namespaces.
#pragma once

namespace metal {

#define MSL_INTEGER_VECTORS(X, T) X(T) X(T##2) X(T##3) X(T##4)
#define MSL_INTEGER_ORDER(T)                                                       \
  MSL_INLINE constexpr T max(T a, T b) { return a < b ? b : a; }                   \
  MSL_INLINE constexpr T min(T a, T b) { return b < a ? b : a; }                   \
  MSL_INLINE constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  MSL_INLINE constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }         \
  MSL_INLINE constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }         \
  MSL_INLINE constexpr T select(T a, T b, bool c) { return c ? b : a; }
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, char)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, uchar)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, short)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, ushort)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, int)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, uint)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, long)
MSL_INTEGER_VECTORS(MSL_INTEGER_ORDER, ulong)
MSL_INLINE bool select(bool a, bool b, bool c) { return c ? b : a; }

MSL_INLINE char abs(char x) { return x < 0 ? -x : x; }
MSL_INLINE short abs(short x) { return x < 0 ? -x : x; }
MSL_INLINE int abs(int x) { return x < 0 ? -x : x; }
MSL_INLINE long abs(long x) { return x < 0 ? -x : x; }
MSL_INLINE uchar abs(uchar x) { return x; }
MSL_INLINE ushort abs(ushort x) { return x; }
MSL_INLINE uint abs(uint x) { return x; }
MSL_INLINE ulong abs(ulong x) { return x; }

template <class T> MSL_INLINE enable_if_t<is_integral_v<T>, T> popcount(T x) {
  return (T)__builtin_popcountl((ulong)x & (~0ul >> (64 - 8 * sizeof(T))));
}
template <class T> MSL_INLINE enable_if_t<is_integral_v<T>, T> clz(T x) {
  ulong bits = (ulong)x & (~0ul >> (64 - 8 * sizeof(T)));
  return (T)(bits ? __builtin_clzl(bits) - (64 - 8 * (int)sizeof(T)) : 8 * (int)sizeof(T));
}
template <class T> MSL_INLINE enable_if_t<is_integral_v<T>, T> ctz(T x) {
  return (T)(x ? __builtin_ctzl((ulong)x) : 8 * (int)sizeof(T));
}
MSL_INLINE uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
MSL_INLINE int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
MSL_INLINE ulong mulhi(ulong a, ulong b) { return (ulong)((unsigned __int128)a * b >> 64); }
MSL_INLINE uint mul24(uint a, uint b) { return (a & 0xffffffu) * (b & 0xffffffu); }
MSL_INLINE uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
MSL_INLINE uint rotate(uint x, uint n) { return __builtin_rotateleft32(x, n); }
MSL_INLINE ulong rotate(ulong x, ulong n) { return __builtin_rotateleft64(x, n); }
MSL_INLINE uint absdiff(int a, int b) { return a < b ? (uint)b - (uint)a : (uint)a - (uint)b; }
MSL_INLINE uint absdiff(uint a, uint b) { return a < b ? b - a : a - b; }
MSL_INLINE uint addsat(uint a, uint b) { return a + b < a ? ~0u : a + b; }
MSL_INLINE uint subsat(uint a, uint b) { return a < b ? 0u : a - b; }
MSL_INLINE uint extract_bits(uint x, uint offset, uint bits) { return bits ? (x >> offset) & (~0u >> (32 - bits)) : 0; }
MSL_INLINE int extract_bits(int x, uint offset, uint bits) { return bits ? (int)((uint)x << (32 - bits - offset)) >> (32 - bits) : 0; }
template <class T> MSL_INLINE T insert_bits(T base, T insert, uint offset, uint bits) {
  T mask = bits ? (T)((~0ul >> (64 - bits)) << offset) : (T)0;
  return (T)((base & ~mask) | ((T)(insert << offset) & mask));
}

// Declared in these namespaces, so that kernels can add overloads there, as MLX's preamble does.
#define MSL_MATH_NAMES \
  using metal::exp; using metal::exp2; using metal::exp10; using metal::log; using metal::log2; using metal::log10; \
  using metal::sin; using metal::cos; using metal::tan; using metal::sinpi; using metal::cospi; using metal::asin; using metal::acos; \
  using metal::atan; using metal::sinh; using metal::cosh; using metal::tanh; using metal::asinh; using metal::acosh; using metal::atanh; \
  using metal::sqrt; using metal::rsqrt; using metal::floor; using metal::ceil; using metal::trunc; using metal::round; using metal::rint; \
  using metal::fabs; using metal::fract; using metal::saturate; using metal::sign; using metal::pow; using metal::powr; \
  using metal::atan2; using metal::fmod; using metal::fmax; using metal::fmin; using metal::fdim; using metal::copysign; using metal::step; \
  using metal::divide; using metal::nextafter; using metal::fma; using metal::mix; using metal::smoothstep; \
  using metal::ldexp; using metal::frexp; using metal::ilogb; using metal::max; using metal::min; using metal::clamp; using metal::abs; \
  using metal::max3; using metal::min3; using metal::select; using metal::isnan; using metal::isinf; using metal::isfinite; \
  using metal::isnormal; using metal::signbit;
namespace fast { MSL_MATH_NAMES }
namespace precise { MSL_MATH_NAMES }

}  // namespace metal
