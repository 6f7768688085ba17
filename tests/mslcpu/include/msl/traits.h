// <metal_type_traits>, <metal_limits>, vector traits and vector construction.
#pragma once

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr __constant T value = v;
  typedef T value_type;
  constexpr operator T() const { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <class T> struct remove_addrspace { typedef T type; };
template <class T> struct remove_addrspace<__global T> { typedef T type; };
template <class T> struct remove_addrspace<__local T> { typedef T type; };
template <class T> struct remove_addrspace<__constant T> { typedef T type; };
template <class T> struct remove_addrspace<__private T> { typedef T type; };
template <class T> struct remove_addrspace<__generic T> { typedef T type; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct remove_const { typedef T type; };
template <class T> struct remove_const<const T> { typedef T type; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> struct remove_volatile { typedef T type; };
template <class T> struct remove_volatile<volatile T> { typedef T type; };
template <class T> using remove_volatile_t = typename remove_volatile<T>::type;
// An address space hides the cv-qualifiers below it, so it is removed too.
template <class T> struct remove_cv { typedef remove_addrspace_t<remove_const_t<remove_volatile_t<remove_addrspace_t<T>>>> type; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference { typedef T type; };
template <class T> struct remove_reference<T&> { typedef T type; };
template <class T> struct remove_reference<T&&> { typedef T type; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T> struct remove_pointer { typedef T type; };
template <class T> struct remove_pointer<T*> { typedef T type; };
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class U> struct conditional { typedef T type; };
template <class T, class U> struct conditional<false, T, U> { typedef U type; };
template <bool B, class T, class U> using conditional_t = typename conditional<B, T, U>::type;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr __constant bool is_same_v = is_same<A, B>::value;
template <class A, class B> struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B> constexpr __constant bool is_convertible_v = is_convertible<A, B>::value;
template <class T> struct is_pointer : false_type {};
template <class T> struct is_pointer<T*> : true_type {};
template <class T> constexpr __constant bool is_pointer_v = is_pointer<T>::value;
template <class... B> struct conjunction : bool_constant<(B::value && ...)> {};
template <class... B> struct disjunction : bool_constant<(B::value || ...)> {};
template <class B> struct negation : bool_constant<!B::value> {};

template <class T> struct is_integral : false_type {};
#define MSL_INTEGRAL(T) template <> struct is_integral<T> : true_type {};
MSL_INTEGRAL(bool) MSL_INTEGRAL(char) MSL_INTEGRAL(signed char) MSL_INTEGRAL(uchar) MSL_INTEGRAL(short) MSL_INTEGRAL(ushort)
MSL_INTEGRAL(int) MSL_INTEGRAL(uint) MSL_INTEGRAL(long) MSL_INTEGRAL(ulong)
template <class T> constexpr __constant bool is_integral_v = is_integral<T>::value;
template <class T> struct is_floating_point : bool_constant<is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T> constexpr __constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T> struct is_arithmetic : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T> constexpr __constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T, bool = is_integral_v<T>> struct is_signed : bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_signed<T, true> : bool_constant<(T(-1) < T(0))> {};
template <class T> constexpr __constant bool is_signed_v = is_signed<T>::value;
template <class T> struct is_unsigned : bool_constant<is_integral_v<T> && !is_signed<T>::value> {};
template <class T> constexpr __constant bool is_unsigned_v = is_unsigned<T>::value;

// uniform<T>: a promise to the compiler, without effect here.
template <class T> using uniform = T;
template <class T> MSL_INLINE T make_uniform(T x) { return x; }

template <class T, int N> struct msl_vec { typedef T type __attribute__((ext_vector_type(N))); };
template <int N> struct msl_vec<bool, N> { typedef int type __attribute__((ext_vector_type(N))); };
template <class T, int N> using vec = typename msl_vec<T, N>::type;

// Element type and number of elements; scalars have one.
template <class T> struct msl_shape { typedef T element; static constexpr __constant int size = 1; };
#define MSL_SHAPE(T, N) template <> struct msl_shape<T##N> { typedef T element; static constexpr __constant int size = N; };
#define MSL_SHAPES(T) MSL_SHAPE(T, 2) MSL_SHAPE(T, 3) MSL_SHAPE(T, 4)
MSL_SHAPES(float) MSL_SHAPES(half) MSL_SHAPES(bfloat) MSL_SHAPES(char) MSL_SHAPES(uchar) MSL_SHAPES(short) MSL_SHAPES(ushort)
MSL_SHAPES(int) MSL_SHAPES(uint) MSL_SHAPES(long) MSL_SHAPES(ulong)
template <class T> constexpr __constant bool is_vector_v = (msl_shape<T>::size > 1);

template <class T> struct numeric_limits {  // integers
  static constexpr bool is_integer = true;
  static constexpr T max() { return is_signed<T>::value ? T((ulong(1) << (sizeof(T) * 8 - 1)) - 1) : T(~T(0)); }
  static constexpr T min() { return is_signed<T>::value ? T(ulong(1) << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T lowest() { return min(); }
};
#define MSL_LIMITS(T, MAX, MIN, EPSILON)                                \
  template <> struct numeric_limits<T> {                                \
    static constexpr T max() { return (T)MAX; }                         \
    static constexpr T min() { return (T)MIN; }                         \
    static constexpr T lowest() { return (T)-MAX; }                     \
    static constexpr T epsilon() { return (T)EPSILON; }                 \
    static constexpr T infinity() { return (T)__builtin_inff(); }       \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }    \
  };
MSL_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f, 1.1920929e-7f)
MSL_LIMITS(half, 65504.0f, 6.103515625e-05f, 0.0009765625f)
MSL_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f, 0.0078125f)

template <class T, size_t N> struct array {
  T elements[N];
  constexpr T operator[](size_t i) const __constant { return elements[i]; }
  constexpr const T& operator[](size_t i) const { return elements[i]; }
  T& operator[](size_t i) { return elements[i]; }
  constexpr size_t size() const { return N; }
};

}  // namespace metal

// Clang lacks conversions between the two 16-bit formats; these go through float. They must be explicit, as in Metal.
template <class T, class U>
MSL_INLINE constexpr T msl_convert(U x) {
  if constexpr (metal::is_same_v<T, bfloat> && metal::is_same_v<metal::decay_t<U>, half>) return (T)(float)x;
  else if constexpr (metal::is_same_v<T, half> && metal::is_same_v<metal::decay_t<U>, bfloat>) return (T)(float)x;
  else return (T)x;
}

// The vector that a packed vector converts to; any other type itself.
template <class T> struct msl_unpacked { typedef T type; };
#define MSL_UNPACKED(T) \
  template <> struct msl_unpacked<packed_##T##2> { typedef T##2 type; }; \
  template <> struct msl_unpacked<packed_##T##3> { typedef T##3 type; }; \
  template <> struct msl_unpacked<packed_##T##4> { typedef T##4 type; };
MSL_UNPACKED(float) MSL_UNPACKED(half) MSL_UNPACKED(bfloat) MSL_UNPACKED(int) MSL_UNPACKED(uint) MSL_UNPACKED(ushort) MSL_UNPACKED(uchar)

// float4(a, b, ...) and vec<T, N>(a, b, ...): the rewriter turns them into msl_make<float4>(a, b, ...).
template <class V, int I, class A, class... Rest>
MSL_INLINE constexpr void msl_place(__private V& v, A a, Rest... rest) {
  typedef typename metal::msl_shape<V>::element E;
  constexpr int n = metal::msl_shape<A>::size;
  if constexpr (n == 1) v[I] = msl_convert<E>(a);
  else for (int i = 0; i < n; i++) v[I + i] = msl_convert<E>((typename metal::msl_shape<A>::element)a[i]);
  if constexpr (sizeof...(Rest) > 0) msl_place<V, I + n>(v, rest...);
}
template <class V, class... A>
MSL_INLINE constexpr V msl_make_of_vectors(A... a) {
  typedef typename metal::msl_shape<V>::element E;
  V v = (V)((E)0);
  if constexpr (sizeof...(A) == 0) return v;
  else if constexpr (sizeof...(A) == 1 && ((metal::msl_shape<A>::size == 1) && ...)) return (V)(msl_convert<E>(a), ...);
  else {
    static_assert((metal::msl_shape<A>::size + ...) == metal::msl_shape<V>::size, "wrong number of components in a vector constructor");
    msl_place<V, 0>(v, a...);
    return v;
  }
}
template <class V, class... A>
MSL_INLINE constexpr V msl_make(A... a) {
  return msl_make_of_vectors<V>((typename msl_unpacked<A>::type)a...);
}
// float4(p[i]) of packed vectors in memory. By value, the compiler would pass four floats as two pairs, and the load would be divided too.
#define MSL_MAKE_FROM(SPACE, T, N)                                             \
  template <class V> MSL_INLINE V msl_make(const SPACE packed_##T##N& packed) { \
    T##N v = packed;                                                           \
    return msl_make_of_vectors<V>(v);                                          \
  }
#define MSL_MAKE_FROM_PACKED(T) \
  MSL_MAKE_FROM(__global, T, 2) MSL_MAKE_FROM(__global, T, 4) MSL_MAKE_FROM(__local, T, 2) MSL_MAKE_FROM(__local, T, 4)
MSL_MAKE_FROM_PACKED(float) MSL_MAKE_FROM_PACKED(half) MSL_MAKE_FROM_PACKED(bfloat) MSL_MAKE_FROM_PACKED(int) MSL_MAKE_FROM_PACKED(uint)
MSL_MAKE_FROM_PACKED(ushort) MSL_MAKE_FROM_PACKED(uchar)
namespace metal { using ::msl_make; }  // for metal::float4(...)
