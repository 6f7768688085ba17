// The runtime's state: one launch at a time, one operating-system thread, one fiber per GPU thread of the running threadgroup.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi.h"

// fibers.cpp: save the callee-saved registers on the running stack, store its pointer to *save and continue on the stack `to`.
extern "C" void mslcpu_switch(void** save, void* to);

namespace mslcpu {

constexpr uint32_t kSimdWidth = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxBuffers = 31;
constexpr uint32_t kThreadgroupLimit = 32768;
constexpr uint32_t kArenaBytes = 1u << 20;  // Metal's limit, and space for red zones
constexpr uint32_t kRedZone = 8192;         // unowned bytes between threadgroup variables

enum class State : uint32_t { kReady, kCollective, kBarrier, kDone };

// The kinds of simdgroup collectives that the runtime itself must know. The shim's other collectives have larger numbers.
enum Kind : uint32_t { kSimdgroupBarrier = 1, kMatrixMultiply = 2, kTensorMultiply = 64 };

enum MemFlags : uint32_t { kMemDevice = 1, kMemThreadgroup = 2 };

// Which thread accessed a location and when: epoch (32 bits) | simdgroup epoch (21) | atomic (1) | thread (10). Barriers advance the epoch, simdgroup
// barriers the simdgroup epoch. The low half lives in the fiber, one for threadgroup memory and one for device memory.
using Stamp = uint64_t;
constexpr uint32_t kStampAtomic = 1u << 10;
constexpr uint32_t kStampSimdEpoch = 1u << 11;
constexpr uint32_t kStampThread = kStampAtomic - 1;

struct Fiber {
  void* stack_pointer;
  State state;
  uint32_t kind;             // of the collective in which it waits
  uint32_t mem_flags;        // of the barrier at which it waits
  uint32_t line;             // of the barrier or collective
  const void* pc;            // of the same
  uint32_t mask;             // lanes that took part in the collective
  uint32_t matrix_accesses;  // simdgroup_load and simdgroup_store calls so far; equal in all lanes unless control flow diverged
  const void* matrix_pc;     // of the last one
  uint32_t threadgroup_low;  // low halves of the stamps
  uint32_t device_low;
  alignas(16) uint8_t deposit[2][64];  // operands of collectives; two, as a lane may reach the next collective before others have read this
  ThreadContext context;
};

struct Simdgroup {
  uint32_t first, lanes;
  uint32_t round;                                // selects the deposit
  uint32_t arrived;                              // lanes waiting in a collective
  bool uniform;                                  // whether all of them wait in the same one
  alignas(32) float a[64], b[64], c[64], d[64];  // operands and result of the matrix product, row-major
  // Of the tensor operation: operands [m, k], [k, n], [m, n], which the lanes put element by element, and the result [m, n].
  std::vector<float> tensors[3], product;
  uint32_t m, n, k;
};

struct ThreadgroupVariable {
  int64_t id;
  const char* name;
  uint32_t offset, bytes;
};

struct Runtime {
  Launch* launch = nullptr;
  Fiber* current = nullptr;  // null: the scheduler runs
  void* scheduler_stack_pointer = nullptr;
  bool failed = false;
  // Set if the next callback must handle more than its own access: a pending comparison or the time limit.
  volatile bool attention = false;
  volatile bool timed_out = false;

  // Stacks of the fibers.
  uint8_t* stacks = nullptr;
  size_t stack_bytes = 0, stacks_bytes = 0;

  // The running threadgroup.
  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  uint32_t threads = 0;
  Fiber* order[kSimdWidth];  // lanes of the running simdgroup in schedule order
  uint32_t order_size = 0, cursor = 0;
  uint64_t random = 1;

  // Threadgroup memory.
  uint8_t* arena = nullptr;
  uint32_t arena_used = 0;
  std::vector<ThreadgroupVariable> variables;

  // Epochs never restart, so shadow memory is not cleared between threadgroups.
  uint32_t threadgroup_epoch = 1, threadgroup_first_epoch = 1;
  uint32_t device_epoch = 1, device_first_epoch = 1;

  // The kernel's own image, whose constant tables it may read.
  const uint8_t *image_begin = nullptr, *image_end = nullptr;
};

extern Runtime runtime;

// errors.cpp: record the first error of a launch. MSLCPU_FAIL, called from a kernel's thread, also abandons the thread.
void record_failure(const void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void abandon_thread();
#define MSLCPU_FAIL(pc, ...)                     \
  do {                                           \
    ::mslcpu::record_failure((pc), __VA_ARGS__); \
    ::mslcpu::abandon_thread();                  \
  } while (0)
void start_watchdog(double seconds);
void stop_watchdog();

// fibers.cpp
void reserve_stacks(uint32_t threads, uint32_t stack_bytes);
void prepare_fiber(uint32_t index);
void switch_to_fiber(Fiber* fiber);  // called by the scheduler
void yield_fiber();                  // called by a thread: switches to the next ready lane or back to the scheduler

// collectives.cpp: compute a product from the operands that all lanes have given.
void multiply(Simdgroup& s);
void multiply_tensors(Simdgroup& s);

// threadgroup_memory.cpp
void reset_threadgroup_epochs_if_used_up();
void begin_threadgroup_memory();
void* declare_threadgroup_variable(int64_t id, uint64_t bytes, const char* name, const void* pc);
void check_threadgroup_access(uint32_t offset, uint64_t bytes, bool write, bool atomic, const void* pc);

// device_memory.cpp
void begin_device_memory();
void end_device_memory();
void check_device_access(uint8_t* address, uint64_t bytes, bool write, bool atomic, const void* pc);
void finish_pending_write();  // compares the bytes of a suspicious store; called before any other check
void attend();

// instructions.cpp: count a checked access of the running thread, and what the simdgroup's lanes accessed since the last call.
constexpr uint32_t kThreadgroupMemory = kMaxBuffers;
void note_access(uint32_t buffer, uint64_t address, uint64_t bytes, bool write, const void* pc);
void count_instructions();
void forget_accesses();

// access.cpp
void check_access(uint8_t* address, uint64_t bytes, bool write, bool atomic, const void* pc);

// Call sites are line * 512 + column % 512 (MSL_LINE in include/msl/runtime.h).
inline uint32_t line_of(uint32_t site) {
  return site / 512;
}

// Whether two accesses of the same epoch with these stamps may happen in either order.
inline bool unordered(Stamp a, Stamp b) {
  uint32_t low_a = static_cast<uint32_t>(a), low_b = static_cast<uint32_t>(b);
  if (((low_a ^ low_b) & kStampThread) == 0) return false;
  if (low_a & low_b & kStampAtomic) return false;
  bool same_simdgroup = ((low_a ^ low_b) & kStampThread) / kSimdWidth == 0;
  return !(same_simdgroup && low_a / kStampSimdEpoch != low_b / kStampSimdEpoch);
}

}  // namespace mslcpu
