// The interface to the runtime (runtime/abi.h and collectives.cpp), barriers, and the objects through which kernel arguments are bound.
#pragma once

struct MslContext {  // mslcpu::ThreadContext
  void* __generic* buffers;
  void* __generic* threadgroup_buffers;
  uint4 position_in_grid, position_in_threadgroup, threadgroup_position, threadgroups, grid, threadgroup_size, dispatch_threadgroup_size;
  uint index_in_threadgroup, lane, simdgroup, simdgroups, dispatch_simdgroups, unused;
};

// Convergent: the compiler must not move it across branches. Not merged: each call keeps its own line.
#define MSL_CONVERGENT __attribute__((convergent, nomerge))

extern "C" {
void msl_threadgroup_barrier(uint line, uint mem_flags) MSL_CONVERGENT;
void msl_simdgroup_barrier(uint line, uint mem_flags) MSL_CONVERGENT;
uint msl_simd_exchange(const __generic void*, uint, uint, uint, const __generic uchar* __generic*, __generic ulong*) MSL_CONVERGENT;
void msl_matrix_multiply(const __generic float*, const __generic float*, const __generic float*, __generic float*, uint)
    MSL_CONVERGENT;
void msl_tensor_multiply(uint m, uint n, uint k, uint line) MSL_CONVERGENT;
void msl_tensor_put(uint operand, uint at, float value);
float msl_tensor_get(uint at);
uint msl_tensor_layout(void) __attribute__((const));
void msl_matrix_access(void) __attribute__((nomerge));
float msl_approximated(float result) __attribute__((const));
void msl_atomic_access(const volatile __generic void*, ulong);
__generic void* msl_threadgroup_variable(long id, ulong bytes, ulong name);
uint msl_lane(void) __attribute__((const));
}

// The result of a function that a GPU only approximates. Checked launches may move it; see inexact in options.py.
#ifndef MSL_CHECKED
#define msl_approximated(RESULT) (RESULT)
#endif

// The line of a call identifies a collective. A return address would not, because compilers duplicate code.
#define MSL_LINE uint msl_line = (uint)__builtin_LINE() * 512u + (uint)__builtin_COLUMN() % 512u

// A threadgroup variable, declared in the kernel as `threadgroup T name[N];`.
template <class T>
MSL_INLINE __local T& msl_threadgroup(long id, __constant const char* name) {
  return *(__local T*)(ulong)msl_threadgroup_variable(id, sizeof(T), (ulong)name);
}

// Converts to any pointer or reference type of a kernel's parameter, so that parameter types need not be parsed.
struct MslBuffer {
  ulong address;
  template <class T> operator __global T*() const { return (__global T*)address; }
  template <class T> operator __constant T*() const { return (__constant T*)address; }
  template <class T> operator __local T*() const { return (__local T*)address; }
  template <class T> operator __global T&() const { return *(__global T*)address; }
  template <class T> operator __constant T&() const { return *(__constant T*)address; }
  template <class T> operator __local T&() const { return *(__local T*)address; }
};
struct MslPosition {
  uint4 v;
  operator uint() const { return v.x; }
  operator ushort() const { return v.x; }
  operator uint2() const { return v.xy; }
  operator uint3() const { return v.xyz; }
  operator ushort2() const { return __builtin_convertvector(v.xy, ushort2); }
  operator ushort3() const { return __builtin_convertvector(v.xyz, ushort3); }
};

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

MSL_INLINE void threadgroup_barrier(mem_flags flags, MSL_LINE) { msl_threadgroup_barrier(msl_line, (uint)flags); }
MSL_INLINE void simdgroup_barrier(mem_flags flags, MSL_LINE) { msl_simdgroup_barrier(msl_line, (uint)flags); }

}  // namespace metal
