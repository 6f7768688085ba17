// The interface of the runtime with Python (launch.py) and with compiled kernels (include/msl/runtime.h, and
// ../metal_on_cuda/cuda_on_cpu.h). Change them together.
#pragma once
#include <cstdint>

namespace mslcpu {

struct Extent {
  uint32_t x, y, z, unused;
};

// All attributes of a thread; a kernel's entry function receives a pointer to them.
struct alignas(16) ThreadContext {
  void** buffers;
  void** threadgroup_buffers;
  Extent position_in_grid;
  Extent position_in_threadgroup;
  Extent threadgroup_position;
  Extent threadgroups;
  Extent grid;
  Extent threadgroup_size;           // size of this threadgroup: smaller at the grid's edge
  Extent dispatch_threadgroup_size;  // the size asked for
  uint32_t index_in_threadgroup;
  uint32_t lane;
  uint32_t simdgroup;
  uint32_t simdgroups;
  uint32_t dispatch_simdgroups;
  uint32_t unused;
};

enum BufferFlags : uint32_t {
  kWritable = 1,
  kInitialized = 2,  // an output that starts from init_value: reading it before writing is allowed
};

// Widths of accesses in bytes per lane: 1, 2, 4, 8, 16, and all that are wider. A width between two of them counts as the larger.
constexpr uint32_t kWidths = 6;

// Loads or stores of one buffer, or of threadgroup memory, as instructions of whole simdgroups (instructions.cpp).
struct Accesses {
  uint64_t instructions[kWidths];
  uint64_t lines;              // device memory: cache lines touched, summed over the instructions
  uint64_t cycles, conflicts;  // threadgroup memory: cycles of its banks, and how many of them are beyond the fewest possible
};

struct Buffer {
  uint8_t* data;    // target of the kernel's pointer
  uint64_t before;  // valid bytes before data (arrays with negative strides)
  uint64_t bytes;   // valid bytes from data on
  uint32_t flags;
  uint32_t itemsize;
  uint64_t read, written, unique_read, unique_written;  // bytes, counted in checked builds
  Accesses loads, stores;
};

enum class Schedule : uint32_t { kForward = 0, kReverse = 1, kRandom = 2, kLockstep = 3 };

struct Launch {
  void (*entry)(ThreadContext*);
  Buffer* buffers;
  const uint32_t* threadgroup_buffer_bytes;
  uint32_t buffer_count;
  uint32_t threadgroup_buffer_count;
  uint32_t grid[3];
  uint32_t threadgroup[3];
  uint32_t checked;
  uint32_t instructions;  // count Accesses
  Schedule schedule;
  uint32_t strict;
  uint32_t stack_bytes;
  uint32_t inexact;        // move the results of approximated functions, flush subnormal numbers
  uint32_t tensor_layout;  // of cooperative tensors: an index of options.py's TENSOR_LAYOUTS
  uint64_t seed;
  double timeout;  // seconds; 0: none
  // Results.
  uint64_t barriers, simd_ops, matrix_ops, atomics, switches, threads, threadgroups;
  uint64_t threadgroup_read, threadgroup_written;
  Accesses threadgroup_loads, threadgroup_stores;
  uint32_t threadgroup_bytes;
  uint32_t failed;
  uint64_t fault_offset;  // offset of the faulty instruction in the kernel's library; 0: unknown
  char message[1024];
};

}  // namespace mslcpu
