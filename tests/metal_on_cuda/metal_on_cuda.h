// The part of Metal's language that metal/*.h use, for NVRTC: CUDA then compiles the kernels unchanged. It needs no header of CUDA.
//
//   Metal                                   here
//   address spaces                          CUDA's pointers are generic, so most are empty macros. `threadgroup` is `volatile`: its pointers stay a
//                                           type of their own, which functions are overloaded for
//   simdgroup (32 lanes)                    warp; every collective of metalens is reached by all lanes, so masks are full
//   simdgroup_matrix                        two elements in each lane, laid out as on Apple GPUs; products by shuffles, in float32
//   half, bfloat, vectors, packed vectors   structures with these names; arithmetic on half rounds after every operation
//
// Left out: swizzles, atomics, textures.
#pragma once

#include "numbers.h"

namespace metal {

using ::abs;
using ::fma;
using ::isfinite;
using ::isnan;
using ::max;
using ::min;
MOC_INLINE float clamp(float x, float low, float high) {
  return fminf(fmaxf(x, low), high);
}
MOC_INLINE int clamp(int x, int low, int high) {
  return ::min(::max(x, low), high);
}
MOC_INLINE uint ctz(uint x) {
  return x == 0 ? 32 : __ffs(int(x)) - 1;
}
template <class T>
MOC_INLINE T select(T a, T b, bool c) {
  return c ? b : a;
}

#define MOC_MATH(NAMESPACE)         \
  namespace NAMESPACE {             \
  MOC_INLINE float exp(float x) {   \
    return ::expf(x);               \
  }                                 \
  MOC_INLINE float exp2(float x) {  \
    return ::exp2f(x);              \
  }                                 \
  MOC_INLINE float log(float x) {   \
    return ::logf(x);               \
  }                                 \
  MOC_INLINE float log2(float x) {  \
    return ::log2f(x);              \
  }                                 \
  MOC_INLINE float tanh(float x) {  \
    return ::tanhf(x);              \
  }                                 \
  MOC_INLINE float sqrt(float x) {  \
    return ::sqrtf(x);              \
  }                                 \
  MOC_INLINE float rsqrt(float x) { \
    return 1.0f / ::sqrtf(x);       \
  }                                 \
  }
MOC_MATH(precise)
MOC_MATH(fast)

constexpr uint MOC_ALL = 0xffffffffu;

template <class T>
MOC_INLINE T moc_from(T x, int lane) {  // the value of another lane
  if constexpr (sizeof(T) == 2) {
    return as_type<T>(ushort(__shfl_sync(MOC_ALL, uint(as_type<ushort>(x)), lane)));
  } else {
    static_assert(sizeof(T) == 4, "collectives take numbers of 16 or 32 bits");
    return as_type<T>(__shfl_sync(MOC_ALL, as_type<uint>(x), lane));
  }
}
MOC_INLINE int moc_lane() {
  return int(threadIdx.x & 31u);
}
template <class T>
MOC_INLINE T simd_shuffle(T x, ushort lane) {
  return moc_from(x, lane);
}
template <class T>
MOC_INLINE T simd_broadcast(T x, ushort lane) {
  return moc_from(x, lane);
}
template <class T>
MOC_INLINE T simd_shuffle_xor(T x, ushort mask) {
  return moc_from(x, moc_lane() ^ mask);
}
template <class T>
MOC_INLINE T simd_shuffle_up(T x, ushort delta) {
  return moc_from(x, ::max(moc_lane() - delta, 0));
}
template <class T>
MOC_INLINE T simd_shuffle_down(T x, ushort delta) {
  return moc_from(x, ::min(moc_lane() + delta, 31));
}
#define MOC_REDUCTION(NAME, COMBINED)                \
  template <class T>                                 \
  MOC_INLINE T NAME(T a) {                           \
    for (int step = 16; step > 0; step /= 2) {       \
      const T b = simd_shuffle_xor(a, ushort(step)); \
      a = COMBINED;                                  \
    }                                                \
    return a;                                        \
  }
MOC_REDUCTION(simd_sum, a + b)
MOC_REDUCTION(simd_max, ::max(a, b))
MOC_REDUCTION(simd_min, ::min(a, b))
MOC_REDUCTION(simd_or, a | b)
MOC_REDUCTION(simd_and, a& b)
MOC_INLINE bool simd_any(bool x) {
  return __any_sync(MOC_ALL, x);
}
MOC_INLINE bool simd_all(bool x) {
  return __all_sync(MOC_ALL, x);
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MOC_INLINE void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
MOC_INLINE void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

// Loads and stores synchronize nothing, so racecheck sees whether the kernel's own barriers suffice.
template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
  vec<T, 2> elements;
  MOC_INLINE vec<T, 2>& thread_elements() {
    return elements;
  }
};
MOC_INLINE int moc_row() {
  return (moc_lane() / 4 & 4) + moc_lane() / 2 % 4;
}
MOC_INLINE int moc_column() {
  return (moc_lane() / 4 & 2) * 2 + moc_lane() % 2 * 2;
}
MOC_INLINE int moc_lane_of(int row, int column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2;
}
template <class T, int Columns, int Rows = Columns>
MOC_INLINE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.elements = vec<T, 2>(value);
  return m;
}
#define MOC_MATRIX_ACCESS(SPACE)                                                                                                          \
  template <class T>                                                                                                                      \
  MOC_INLINE void simdgroup_load(                                                                                                         \
      simdgroup_matrix<T, 8, 8>& m, const SPACE T* p, ulong pitch = 8, vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false) { \
    p += origin.x + origin.y * pitch;                                                                                                     \
    for (int i = 0; i < 2; ++i) {                                                                                                         \
      const ulong row = moc_row(), column = moc_column() + i;                                                                             \
      m.elements[i] = transpose ? p[column * pitch + row] : p[row * pitch + column];                                                      \
    }                                                                                                                                     \
  }                                                                                                                                       \
  template <class T>                                                                                                                      \
  MOC_INLINE void simdgroup_store(                                                                                                        \
      simdgroup_matrix<T, 8, 8> m, SPACE T* p, ulong pitch = 8, vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false) {        \
    p += origin.x + origin.y * pitch;                                                                                                     \
    for (int i = 0; i < 2; ++i) {                                                                                                         \
      const ulong row = moc_row(), column = moc_column() + i;                                                                             \
      p[transpose ? column * pitch + row : row * pitch + column] = m.elements[i];                                                         \
    }                                                                                                                                     \
  }
MOC_MATRIX_ACCESS()
MOC_MATRIX_ACCESS(volatile)
template <class A, class B>
MOC_INLINE void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<float, 8, 8> c) {
#pragma unroll 1  // two terms of the sum at a time: compilers take long over what is unrolled
  for (int k = 0; k < 8; k += 2) {
    for (int t = 0; t < 2; ++t) {
      const float x = moc_from(float(a.elements[t]), moc_lane_of(moc_row(), k));
      const int from = moc_lane_of(k + t, moc_column());
      c.elements[0] = fmaf(x, moc_from(float(b.elements[0]), from), c.elements[0]);
      c.elements[1] = fmaf(x, moc_from(float(b.elements[1]), from), c.elements[1]);
    }
  }
  d = c;
}
template <class A, class B>
MOC_INLINE void simdgroup_multiply(simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

}  // namespace metal

// Address spaces. Last, so that nothing above sees them.
#define device
#define constant
#define thread
#define threadgroup volatile
