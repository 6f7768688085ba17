// Metal's numbers for metal_on_cuda.h: 16-bit floats, vectors and packed vectors.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#define MOC_INLINE __device__ __forceinline__
#define METAL_FUNC MOC_INLINE
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

template <class To, class From>
MOC_INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Copies from and to threadgroup memory. The access itself need not be volatile.
#define MOC_VOLATILE(NAME)                                         \
  NAME(const NAME&) = default;                                     \
  NAME& operator=(const NAME&) = default;                          \
  MOC_INLINE NAME(const volatile NAME& other) {                    \
    *this = const_cast<const NAME&>(other);                        \
  }                                                                \
  MOC_INLINE NAME& operator=(const volatile NAME& other) {         \
    return *this = const_cast<const NAME&>(other);                 \
  }                                                                \
  MOC_INLINE void operator=(const NAME& other) volatile {          \
    const_cast<NAME&>(*this) = other;                              \
  }                                                                \
  MOC_INLINE void operator=(const volatile NAME& other) volatile { \
    const_cast<NAME&>(*this) = const_cast<const NAME&>(other);     \
  }

// Conversions of 16-bit floats. A host that compiles this file has conversions of its own.
#ifndef MOC_TO_HALF
#define MOC_TO_HALF(BITS, X) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(BITS) : "f"(X))
#define MOC_FROM_HALF(X, BITS) asm("cvt.f32.f16 %0, %1;" : "=f"(X) : "h"(BITS))
#define MOC_TO_BFLOAT(BITS, X) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(BITS) : "f"(X))
#endif
#define MOC_FROM_BFLOAT(X, BITS) X = __int_as_float(int(BITS) << 16)

// 16-bit floats: implicitly converted to float, and from it only explicitly.
#define MOC_FLOAT16(NAME, FROM_FLOAT, TO_FLOAT)  \
  struct NAME {                                  \
    ushort bits;                                 \
    NAME() = default;                            \
    MOC_VOLATILE(NAME)                           \
    MOC_INLINE explicit NAME(float x) {          \
      FROM_FLOAT(bits, x);                       \
    }                                            \
    MOC_INLINE operator float() const {          \
      float x;                                   \
      TO_FLOAT(x, bits);                         \
      return x;                                  \
    }                                            \
    MOC_INLINE operator float() const volatile { \
      return float(NAME(*this));                 \
    }                                            \
  };                                             \
  MOC_INLINE NAME operator+(NAME a, NAME b) {    \
    return NAME(float(a) + float(b));            \
  }                                              \
  MOC_INLINE NAME operator-(NAME a, NAME b) {    \
    return NAME(float(a) - float(b));            \
  }                                              \
  MOC_INLINE NAME operator*(NAME a, NAME b) {    \
    return NAME(float(a) * float(b));            \
  }                                              \
  MOC_INLINE NAME operator/(NAME a, NAME b) {    \
    return NAME(float(a) / float(b));            \
  }                                              \
  MOC_INLINE NAME operator-(NAME a) {            \
    return NAME(-float(a));                      \
  }
MOC_FLOAT16(half, MOC_TO_HALF, MOC_FROM_HALF)
MOC_FLOAT16(bfloat, MOC_TO_BFLOAT, MOC_FROM_BFLOAT)

namespace metal {

// Vectors are aligned like the whole, packed vectors like one element.
template <class T, int N>
struct packed_vec;
template <class T, int N>
struct vec;

#define MOC_VECTOR(N, ALIGNED, MEMBERS, FROM_SCALAR)                              \
  template <class T>                                                              \
  struct alignas(ALIGNED * sizeof(T)) vec<T, N> {                                 \
    T MEMBERS;                                                                    \
    vec() = default;                                                              \
    MOC_VOLATILE(vec)                                                             \
    MOC_INLINE vec(T s) : FROM_SCALAR {                                           \
    }                                                                             \
    template <class U>                                                            \
    MOC_INLINE explicit vec(vec<U, N> other) {                                    \
      for (int i = 0; i < N; ++i) (*this)[i] = T(other[i]);                       \
    }                                                                             \
    template <class U>                                                            \
    MOC_INLINE explicit vec(packed_vec<U, N> other) : vec(vec<U, N>(other.v())) { \
    }                                                                             \
    MOC_VECTOR_FROM_PARTS_##N MOC_INLINE T& operator[](int i) {                   \
      return (&x)[i];                                                             \
    }                                                                             \
    MOC_INLINE const T& operator[](int i) const {                                 \
      return (&x)[i];                                                             \
    }                                                                             \
  };
#define MOC_COMMA ,
#define MOC_VECTOR_FROM_PARTS_2           \
  MOC_INLINE vec(T a, T b) : x(a), y(b) { \
  }
#define MOC_VECTOR_FROM_PARTS_3                      \
  MOC_INLINE vec(T a, T b, T c) : x(a), y(b), z(c) { \
  }
#define MOC_VECTOR_FROM_PARTS_4                                               \
  MOC_INLINE vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {               \
  }                                                                           \
  MOC_INLINE vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) { \
  }
MOC_VECTOR(2, 2, x MOC_COMMA y, x(s) MOC_COMMA y(s))
MOC_VECTOR(3, 4, x MOC_COMMA y MOC_COMMA z, x(s) MOC_COMMA y(s) MOC_COMMA z(s))
MOC_VECTOR(4, 4, x MOC_COMMA y MOC_COMMA z MOC_COMMA w, x(s) MOC_COMMA y(s) MOC_COMMA z(s) MOC_COMMA w(s))

template <class T, int N>
struct packed_vec {
  T element[N];
  packed_vec() = default;
  MOC_INLINE packed_vec(vec<T, N> whole) {
    for (int i = 0; i < N; ++i) element[i] = whole[i];
  }
  MOC_INLINE vec<T, N> v() const {
    vec<T, N> whole;
    for (int i = 0; i < N; ++i) whole[i] = element[i];
    return whole;
  }
  MOC_INLINE operator vec<T, N>() const {
    return v();
  }
  MOC_INLINE T& operator[](int i) {
    return element[i];
  }
  MOC_INLINE const T& operator[](int i) const {
    return element[i];
  }
};

#define MOC_ELEMENTWISE(OPERATOR)                                    \
  template <class T, int N>                                          \
  MOC_INLINE vec<T, N> operator OPERATOR(vec<T, N> a, vec<T, N> b) { \
    vec<T, N> r;                                                     \
    for (int i = 0; i < N; ++i) r[i] = T(a[i] OPERATOR b[i]);        \
    return r;                                                        \
  }                                                                  \
  template <class T, int N, class S>                                 \
  MOC_INLINE vec<T, N> operator OPERATOR(vec<T, N> a, S b) {         \
    return a OPERATOR vec<T, N>(T(b));                               \
  }                                                                  \
  template <class T, int N, class S>                                 \
  MOC_INLINE vec<T, N> operator OPERATOR(S a, vec<T, N> b) {         \
    return vec<T, N>(T(a)) OPERATOR b;                               \
  }
MOC_ELEMENTWISE(+)
MOC_ELEMENTWISE(-)
MOC_ELEMENTWISE(*)
MOC_ELEMENTWISE(/)
MOC_ELEMENTWISE(&)
MOC_ELEMENTWISE(|)
MOC_ELEMENTWISE(^)
MOC_ELEMENTWISE(>>)
MOC_ELEMENTWISE(<<)
#define MOC_ASSIGNMENT(OPERATOR)                                  \
  template <class T, int N, class S>                              \
  MOC_INLINE vec<T, N>& operator OPERATOR##=(vec<T, N>& a, S b) { \
    return a = a OPERATOR b;                                      \
  }
MOC_ASSIGNMENT(+)
MOC_ASSIGNMENT(-)
MOC_ASSIGNMENT(*)

template <class T, int N>
MOC_INLINE vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r[i] = T(::fmaf(float(a[i]), float(b[i]), float(c[i])));
  return r;
}
template <class T, int N>
MOC_INLINE float dot(vec<T, N> a, vec<T, N> b) {
  float sum = 0.0f;
  for (int i = 0; i < N; ++i) sum += float(a[i]) * float(b[i]);
  return sum;
}

}  // namespace metal

// Metal's names of vectors. CUDA has types with some of these names, so they are macros.
#define MOC_NAMES(T)                             \
  typedef metal::vec<T, 2> moc_##T##2;           \
  typedef metal::vec<T, 3> moc_##T##3;           \
  typedef metal::vec<T, 4> moc_##T##4;           \
  typedef metal::packed_vec<T, 2> packed_##T##2; \
  typedef metal::packed_vec<T, 3> packed_##T##3; \
  typedef metal::packed_vec<T, 4> packed_##T##4;
MOC_NAMES(float)
MOC_NAMES(half)
MOC_NAMES(bfloat)
MOC_NAMES(int)
MOC_NAMES(uint)
MOC_NAMES(short)
MOC_NAMES(ushort)
MOC_NAMES(uchar)
MOC_NAMES(ulong)
#define float2 moc_float2
#define float3 moc_float3
#define float4 moc_float4
#define half2 moc_half2
#define half3 moc_half3
#define half4 moc_half4
#define bfloat2 moc_bfloat2
#define bfloat3 moc_bfloat3
#define bfloat4 moc_bfloat4
#define int2 moc_int2
#define int3 moc_int3
#define int4 moc_int4
#define uint2 moc_uint2
#define uint3 moc_uint3
#define uint4 moc_uint4
#define short2 moc_short2
#define short4 moc_short4
#define ushort2 moc_ushort2
#define ushort3 moc_ushort3
#define ushort4 moc_ushort4
#define uchar2 moc_uchar2
#define uchar4 moc_uchar4
#define ulong2 moc_ulong2
