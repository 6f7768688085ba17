// Scalar and vector types.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define MSL_INLINE inline __attribute__((always_inline))
// For functions that access the runtime's own memory, which the access checks do not know.
#define MSL_UNCHECKED __attribute__((no_sanitize("address", "alignment", "array-bounds"), noinline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef __bf16 bfloat;

#define MSL_VECTOR(T, N) typedef T T##N __attribute__((ext_vector_type(N)));
#define MSL_VECTORS(T) MSL_VECTOR(T, 2) MSL_VECTOR(T, 3) MSL_VECTOR(T, 4)
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
// clang has no vectors of bool; comparisons of 4-byte vectors give vectors of int, so these stand for them.
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;

// A whole vector of two or four elements is one access, although it is aligned like one element. Three elements are three accesses: a vector of three
// would access a fourth.
#define MSL_PACKED(T, N)                                                                                 \
  typedef T##N msl_loose_##T##N __attribute__((aligned(sizeof(T))));                                     \
  struct packed_##T##N {                                                                                 \
    T element[N];                                                                                        \
    packed_##T##N() {}                                                                                   \
    packed_##T##N(T##N v) { for (int i = 0; i < N; i++) element[i] = v[i]; }                             \
    operator T##N() const {                                                                              \
      if (N != 3) return *(const __generic msl_loose_##T##N*)element;                                    \
      T##N v;                                                                                            \
      for (int i = 0; i < N; i++) v[i] = element[i];                                                     \
      return v;                                                                                          \
    }                                                                                                    \
    T operator[](int i) const { return element[i]; }                                                     \
    T& operator[](int i) { return element[i]; }                                                          \
  };
#define MSL_PACKEDS(T) MSL_PACKED(T, 2) MSL_PACKED(T, 3) MSL_PACKED(T, 4)
MSL_PACKEDS(float)
MSL_PACKEDS(half)
MSL_PACKEDS(bfloat)
MSL_PACKEDS(ushort)
MSL_PACKEDS(int)
MSL_PACKEDS(uint)
MSL_PACKEDS(uchar)

template <class T, class U>
MSL_INLINE constexpr T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different sizes");
  return __builtin_bit_cast(T, value);
}
