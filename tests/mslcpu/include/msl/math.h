// <metal_math>, <metal_common>, <metal_relational>, <metal_geometric>. All arithmetic functions go through float, so half and bfloat results are
// correctly rounded. This file has only functions of Metal: expm1, log1p, erf and the like must stay compile errors.
#pragma once

namespace metal {

// Metal's library has these functions for bfloat too, unless MLX's own preamble defines them (MSL_MLX_PREAMBLE, see build.translate).
#ifdef MSL_MLX_PREAMBLE
#define MSL_OF_BFLOAT(...)
#else
#define MSL_OF_BFLOAT(...) __VA_ARGS__
#endif

// Overloads for each type instead of one template, so that a call with mixed types is ambiguous, as it is in Metal.
#define MSL_FLOAT_VECTORS(X) X(half2) X(half3) X(half4) X(float2) X(float3) X(float4) X(bfloat2) X(bfloat3) X(bfloat4)

#define MSL_FOR_EACH(V, EXPRESSION)                                    \
  {                                                                    \
    typedef typename msl_shape<V>::element E;                          \
    V r;                                                               \
    for (int i = 0; i < msl_shape<V>::size; i++) r[i] = EXPRESSION;    \
    return r;                                                          \
  }

// A function of one floating-point argument, defined for float.
#define MSL_UNARY(NAME, RESULT)                                                                                       \
  namespace msl_float { MSL_INLINE float NAME(float x) { return RESULT; } }                                           \
  MSL_INLINE float NAME(float x) { return msl_float::NAME(x); }                                                       \
  MSL_INLINE half NAME(half x) { return (half)msl_float::NAME((float)x); }                                            \
  MSL_OF_BFLOAT(MSL_INLINE bfloat NAME(bfloat x) { return (bfloat)msl_float::NAME((float)x); }) \
  template <class V> MSL_INLINE enable_if_t<is_vector_v<V>, V> NAME(V x) MSL_FOR_EACH(V, (E)msl_float::NAME((float)x[i])) \
  template <class V> MSL_INLINE enable_if_t<is_integral_v<V>, float> NAME(V x) { return msl_float::NAME((float)x); }

MSL_UNARY(exp, msl_approximated(__builtin_expf(x)))
MSL_UNARY(exp2, msl_approximated(__builtin_exp2f(x)))
MSL_UNARY(exp10, msl_approximated(__builtin_powf(10.0f, x)))
MSL_UNARY(log, msl_approximated(__builtin_logf(x)))
MSL_UNARY(log2, msl_approximated(__builtin_log2f(x)))
MSL_UNARY(log10, msl_approximated(__builtin_log10f(x)))
MSL_UNARY(sin, msl_approximated(__builtin_sinf(x)))
MSL_UNARY(cos, msl_approximated(__builtin_cosf(x)))
MSL_UNARY(tan, msl_approximated(__builtin_tanf(x)))
MSL_UNARY(sinpi, msl_approximated(__builtin_sinf(3.14159265358979f * x)))
MSL_UNARY(cospi, msl_approximated(__builtin_cosf(3.14159265358979f * x)))
MSL_UNARY(asin, msl_approximated(__builtin_asinf(x)))
MSL_UNARY(acos, msl_approximated(__builtin_acosf(x)))
MSL_UNARY(atan, msl_approximated(__builtin_atanf(x)))
MSL_UNARY(sinh, msl_approximated(__builtin_sinhf(x)))
MSL_UNARY(cosh, msl_approximated(__builtin_coshf(x)))
MSL_UNARY(tanh, msl_approximated(__builtin_tanhf(x)))
MSL_UNARY(asinh, msl_approximated(__builtin_asinhf(x)))
MSL_UNARY(acosh, msl_approximated(__builtin_acoshf(x)))
MSL_UNARY(atanh, msl_approximated(__builtin_atanhf(x)))
MSL_UNARY(sqrt, __builtin_sqrtf(x))
MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_UNARY(floor, __builtin_floorf(x))
MSL_UNARY(ceil, __builtin_ceilf(x))
MSL_UNARY(trunc, __builtin_truncf(x))
MSL_UNARY(round, __builtin_roundf(x))
MSL_UNARY(rint, __builtin_rintf(x))
MSL_UNARY(fabs, __builtin_fabsf(x))
MSL_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MSL_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MSL_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)

#define MSL_BINARY(NAME, RESULT)                                                                                                    \
  namespace msl_float { MSL_INLINE float NAME(float x, float y) { return RESULT; } }                                                \
  MSL_INLINE float NAME(float x, float y) { return msl_float::NAME(x, y); }                                                         \
  MSL_INLINE half NAME(half x, half y) { return (half)msl_float::NAME((float)x, (float)y); }                                        \
  MSL_OF_BFLOAT(MSL_INLINE bfloat NAME(bfloat x, bfloat y) { return (bfloat)msl_float::NAME((float)x, (float)y); }) \
  template <class V> MSL_INLINE enable_if_t<is_vector_v<V>, V> NAME(V x, V y) MSL_FOR_EACH(V, (E)msl_float::NAME((float)x[i], (float)y[i]))

MSL_BINARY(pow, msl_approximated(__builtin_powf(x, y)))
MSL_BINARY(powr, msl_approximated(__builtin_powf(x, y)))
MSL_BINARY(atan2, msl_approximated(__builtin_atan2f(x, y)))
MSL_BINARY(fmod, __builtin_fmodf(x, y))
MSL_BINARY(fmax, __builtin_fmaxf(x, y))
MSL_BINARY(fmin, __builtin_fminf(x, y))
MSL_BINARY(fdim, __builtin_fdimf(x, y))
MSL_BINARY(copysign, __builtin_copysignf(x, y))
MSL_BINARY(step, y < x ? 0.0f : 1.0f)
MSL_BINARY(divide, x / y)
MSL_BINARY(nextafter, __builtin_nextafterf(x, y))

MSL_INLINE float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
MSL_INLINE half ldexp(half x, int e) { return (half)__builtin_ldexpf((float)x, e); }
MSL_INLINE float frexp(float x, __private int& e) { int t; float r = __builtin_frexpf(x, &t); e = t; return r; }
MSL_INLINE int ilogb(float x) { return __builtin_ilogbf(x); }

#define MSL_TERNARY(NAME, RESULT)                                                                                          \
  namespace msl_float { MSL_INLINE float NAME(float x, float y, float z) { return RESULT; } }                              \
  MSL_INLINE float NAME(float x, float y, float z) { return msl_float::NAME(x, y, z); }                                    \
  MSL_INLINE half NAME(half x, half y, half z) { return (half)msl_float::NAME((float)x, (float)y, (float)z); }             \
  MSL_OF_BFLOAT(MSL_INLINE bfloat NAME(bfloat x, bfloat y, bfloat z) { return (bfloat)msl_float::NAME((float)x, (float)y, (float)z); }) \
  template <class V> MSL_INLINE enable_if_t<is_vector_v<V>, V> NAME(V x, V y, V z)                                         \
      MSL_FOR_EACH(V, (E)msl_float::NAME((float)x[i], (float)y[i], (float)z[i]))

MSL_TERNARY(fma, __builtin_fmaf(x, y, z))
MSL_TERNARY(mix, x + (y - x) * z)
MSL_TERNARY(smoothstep, (z = __builtin_fminf(__builtin_fmaxf((z - x) / (y - x), 0.0f), 1.0f), z * z * (3.0f - 2.0f * z)))

// max, min, clamp and abs of floating-point numbers are fmax and so on: of a NaN and a number, the result is the number.
#define MSL_FLOAT_ORDER(T)                                                        \
  MSL_INLINE T max(T a, T b) { return fmax(a, b); }                               \
  MSL_INLINE T min(T a, T b) { return fmin(a, b); }                               \
  MSL_INLINE T clamp(T x, T low, T high) { return fmin(fmax(x, low), high); }     \
  MSL_INLINE T abs(T x) { return fabs(x); }                                       \
  MSL_INLINE T max3(T a, T b, T c) { return fmax(fmax(a, b), c); }                \
  MSL_INLINE T min3(T a, T b, T c) { return fmin(fmin(a, b), c); }                \
  MSL_INLINE T select(T a, T b, bool c) { return c ? b : a; }
MSL_FLOAT_ORDER(float)
MSL_FLOAT_ORDER(half)
MSL_OF_BFLOAT(MSL_FLOAT_ORDER(bfloat))
MSL_FLOAT_VECTORS(MSL_FLOAT_ORDER)

#define MSL_CLASSIFY(T)                                                                             \
  MSL_INLINE bool isnan(T x) { return x != x; }                                                     \
  MSL_INLINE bool isinf(T x) { return __builtin_fabsf((float)x) == __builtin_inff(); }              \
  MSL_INLINE bool isfinite(T x) { return __builtin_fabsf((float)x) < __builtin_inff(); }            \
  MSL_INLINE bool isnormal(T x) { return isfinite(x) && __builtin_fabsf((float)x) >= (float)numeric_limits<T>::min(); } \
  MSL_INLINE bool signbit(T x) { return __builtin_signbitf((float)x); }
MSL_CLASSIFY(float)
MSL_CLASSIFY(half)
MSL_CLASSIFY(bfloat)
#define MSL_CLASSIFY_VECTOR(V)                                                                                         \
  MSL_INLINE vec<bool, msl_shape<V>::size> isnan(V x) {                                                                \
    vec<bool, msl_shape<V>::size> r;                                                                                   \
    for (int i = 0; i < msl_shape<V>::size; i++) r[i] = x[i] != x[i];                                                  \
    return r;                                                                                                          \
  }
MSL_FLOAT_VECTORS(MSL_CLASSIFY_VECTOR)

// select(a, b, c) of vectors; c is a comparison, whose elements are integers as wide as those compared.
template <class V, class C>
MSL_INLINE enable_if_t<is_vector_v<V> && is_vector_v<C>, V> select(V a, V b, C c) {
  V r;
  for (int i = 0; i < msl_shape<V>::size; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class V> MSL_INLINE enable_if_t<is_vector_v<V>, bool> any(V v) {
  bool r = false;
  for (int i = 0; i < msl_shape<V>::size; i++) r |= v[i] != 0;
  return r;
}
template <class V> MSL_INLINE enable_if_t<is_vector_v<V>, bool> all(V v) {
  bool r = true;
  for (int i = 0; i < msl_shape<V>::size; i++) r &= v[i] != 0;
  return r;
}
MSL_INLINE bool any(bool b) { return b; }
MSL_INLINE bool all(bool b) { return b; }

template <class V> MSL_INLINE float msl_dot(V a, V b) {
  float sum = 0;
  for (int i = 0; i < msl_shape<V>::size; i++) sum += (float)a[i] * (float)b[i];
  return sum;
}
template <class V> MSL_INLINE typename msl_shape<V>::element dot(V a, V b) { return (typename msl_shape<V>::element)msl_dot(a, b); }
template <class V> MSL_INLINE typename msl_shape<V>::element length_squared(V a) { return dot(a, a); }
template <class V> MSL_INLINE typename msl_shape<V>::element length(V a) {
  return (typename msl_shape<V>::element)__builtin_sqrtf(msl_dot(a, a));
}

}  // namespace metal
