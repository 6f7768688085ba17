// <metal_atomic>. One operating-system thread runs all threads of a launch, so plain operations are atomic. Each one is reported to the checker.
#pragma once

namespace metal {

template <class T> struct atomic { T value; };
// OpenCL has types called atomic_int and so on: keywords.h maps those names to these.
typedef atomic<int> msl_atomic_int;
typedef atomic<uint> msl_atomic_uint;
typedef atomic<float> msl_atomic_float;
typedef atomic<bool> msl_atomic_bool;
typedef atomic<ulong> msl_atomic_ulong;

#define MSL_ATOMIC volatile __generic atomic<T>*

template <class T> MSL_UNCHECKED T msl_atomic_get(const volatile __generic T* p) { return *p; }
template <class T> MSL_UNCHECKED void msl_atomic_set(volatile __generic T* p, T value) { *p = value; }

template <class T> MSL_INLINE T atomic_load_explicit(const MSL_ATOMIC p, memory_order) {
  msl_atomic_access(&p->value, sizeof(T));
  return msl_atomic_get(&p->value);
}
template <class T, class U> MSL_INLINE void atomic_store_explicit(MSL_ATOMIC p, U value, memory_order) {
  msl_atomic_access(&p->value, sizeof(T));
  msl_atomic_set(&p->value, (T)value);
}

#define MSL_ATOMIC_UPDATE(NAME, RESULT)                                                                \
  template <class T, class U> MSL_INLINE T atomic_##NAME##_explicit(MSL_ATOMIC p, U operand, memory_order) { \
    msl_atomic_access(&p->value, sizeof(T));                                                           \
    T a = msl_atomic_get(&p->value), b = (T)operand;                                                   \
    msl_atomic_set(&p->value, (T)(RESULT));                                                            \
    return a;                                                                                          \
  }
MSL_ATOMIC_UPDATE(exchange, b)
MSL_ATOMIC_UPDATE(fetch_add, a + b)
MSL_ATOMIC_UPDATE(fetch_sub, a - b)
MSL_ATOMIC_UPDATE(fetch_min, a < b ? a : b)
MSL_ATOMIC_UPDATE(fetch_max, a > b ? a : b)
MSL_ATOMIC_UPDATE(fetch_and, a & b)
MSL_ATOMIC_UPDATE(fetch_or, a | b)
MSL_ATOMIC_UPDATE(fetch_xor, a ^ b)

template <class T, class U>
MSL_INLINE bool atomic_compare_exchange_weak_explicit(MSL_ATOMIC p, __private T* expected, U desired, memory_order, memory_order) {
  msl_atomic_access(&p->value, sizeof(T));
  T old = msl_atomic_get(&p->value);
  bool equal = __builtin_memcmp((const char*)&old, (const char*)expected, sizeof(T)) == 0;
  if (equal) msl_atomic_set(&p->value, (T)desired);
  else *expected = old;
  return equal;
}

}  // namespace metal
