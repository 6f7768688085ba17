// The part of CUDA that metal_on_cuda.h uses, on the fibers of tests/mslcpu: a program for a GPU then runs on a CPU, and the shim itself is tested.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // threadgroups run one after another

namespace cpu {

struct Extent {
  uint32_t x, y, z, unused;
};
struct alignas(16) Context {  // tests/mslcpu/runtime/abi.h: ThreadContext
  void** buffers;
  void** threadgroup_buffers;
  Extent position_in_grid, position_in_threadgroup, threadgroup_position, threadgroups;
};

}  // namespace cpu

#define CPU_COLLECTIVE __attribute__((convergent, nomerge))
extern "C" {
const cpu::Context* msl_context(void);
uint32_t msl_simd_exchange(const void*, uint32_t bytes, uint32_t kind, uint32_t line, const uint8_t** base, uint64_t* stride) CPU_COLLECTIVE;
void msl_threadgroup_barrier(uint32_t line, uint32_t mem_flags) CPU_COLLECTIVE;
void msl_simdgroup_barrier(uint32_t line, uint32_t mem_flags) CPU_COLLECTIVE;
}

#define threadIdx (msl_context()->position_in_threadgroup)
#define blockIdx (msl_context()->threadgroup_position)
#define gridDim (msl_context()->threadgroups)

namespace cpu {

enum Kind : uint32_t { kShuffle = 10, kVote = 11 };

template <class T>
inline T of_lane(const uint8_t* base, uint64_t stride, int lane) {
  T value;
  memcpy(&value, base + stride * static_cast<uint32_t>(lane), sizeof(T));
  return value;
}

inline uint32_t votes(bool mine) {
  const uint32_t x = mine;
  const uint8_t* base;
  uint64_t stride;
  msl_simd_exchange(&x, sizeof x, kVote, 1, &base, &stride);
  uint32_t count = 0;
  for (int lane = 0; lane < 32; ++lane) count += of_lane<uint32_t>(base, stride, lane);
  return count;
}

}  // namespace cpu

template <class T>
inline T __shfl_sync(uint32_t, T x, int lane) {
  const uint8_t* base;
  uint64_t stride;
  msl_simd_exchange(&x, sizeof x, cpu::kShuffle, 1, &base, &stride);
  return cpu::of_lane<T>(base, stride, lane & 31);
}
inline bool __any_sync(uint32_t, bool x) {
  return cpu::votes(x) > 0;
}
inline bool __all_sync(uint32_t, bool x) {
  return cpu::votes(x) == 32;
}
inline void __syncthreads() {
  msl_threadgroup_barrier(1, 3);
}
inline void __syncwarp() {
  msl_simdgroup_barrier(1, 3);
}

inline float __int_as_float(int bits) {
  return __builtin_bit_cast(float, bits);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}
inline float min(float a, float b) {
  return fminf(a, b);
}
#define CPU_ORDER(T)       \
  inline T max(T a, T b) { \
    return a < b ? b : a;  \
  }                        \
  inline T min(T a, T b) { \
    return b < a ? b : a;  \
  }
CPU_ORDER(int)
CPU_ORDER(unsigned)
CPU_ORDER(long)
CPU_ORDER(unsigned long)

#define MOC_TO_HALF(BITS, X) BITS = __builtin_bit_cast(unsigned short, (_Float16)(X))
#define MOC_FROM_HALF(X, BITS) X = (float)__builtin_bit_cast(_Float16, BITS)
#define MOC_TO_BFLOAT(BITS, X) BITS = __builtin_bit_cast(unsigned short, (__bf16)(X))
