// What MLX's preamble takes from Apple's compiler and library beyond the documented language. Declared only: with that preamble, kernels are compiled
// but not run.
#pragma once

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define MSL_BUILTIN(NAME) template <class T, class... Rest> T __metal_##NAME(T, Rest...);
#define MSL_BUILTINS(A, B, C, D) MSL_BUILTIN(A) MSL_BUILTIN(B) MSL_BUILTIN(C) MSL_BUILTIN(D)
MSL_BUILTINS(acos, acosh, asin, asinh)
MSL_BUILTINS(atan, atan2, atanh, ceil)
MSL_BUILTINS(cos, cosh, cospi, divide)
MSL_BUILTINS(exp, exp10, exp2, fabs)
MSL_BUILTINS(floor, fma, fmax, fmax3)
MSL_BUILTINS(fmedian3, fmin, fmin3, fmod)
MSL_BUILTINS(fract, frexp, get_simdgroup_size, ldexp)
MSL_BUILTINS(log, log10, log2, nextafter)
MSL_BUILTINS(pow, powr, rint, round)
MSL_BUILTINS(rsqrt, sin, sinh, sinpi)
MSL_BUILTINS(sqrt, tan, tanh, tanpi)
MSL_BUILTINS(trunc, simd_broadcast, simd_max, simd_min)
MSL_BUILTINS(simd_prefix_exclusive_product, simd_prefix_exclusive_sum, simd_prefix_inclusive_product, simd_prefix_inclusive_sum)
MSL_BUILTINS(simd_product, simd_shuffle, simd_shuffle_and_fill_down, simd_shuffle_and_fill_up)
MSL_BUILTINS(simd_shuffle_down, simd_shuffle_rotate_down, simd_shuffle_rotate_up, simd_shuffle_up)
MSL_BUILTIN(simd_shuffle_xor) MSL_BUILTIN(simd_sum) MSL_BUILTIN(simd_xor)

namespace metal {

struct os_log {
  os_log(__constant const char*, __constant const char*) {}
  template <class... Values> void log_debug(__constant const char*, Values...) const {}
  template <class... Values> void log_info(__constant const char*, Values...) const {}
};

}  // namespace metal
