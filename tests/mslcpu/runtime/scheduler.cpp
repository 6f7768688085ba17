// The scheduler: threadgroups one after another, simdgroups in the order of the schedule, lanes until all of them wait.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "state.h"

namespace mslcpu {

namespace {

uint32_t random_below(uint32_t bound) {  // xorshift64
  runtime.random ^= runtime.random << 13;
  runtime.random ^= runtime.random >> 7;
  runtime.random ^= runtime.random << 17;
  return static_cast<uint32_t>((runtime.random >> 11) % bound);
}

// Put items into the order of the schedule.
template <typename Items>
void arrange(Items& items, size_t count) {
  if (runtime.launch->schedule == Schedule::kReverse) {
    std::reverse(&items[0], &items[0] + count);
  } else if (runtime.launch->schedule == Schedule::kRandom) {
    for (size_t i = count; i > 1; i--) std::swap(items[i - 1], items[random_below(static_cast<uint32_t>(i))]);
  }
}

void fail_in(Fiber* fiber, const char* format, const char* what, uint32_t mask) {
  runtime.current = fiber;
  record_failure(fiber->pc, format, what, mask);
  runtime.current = nullptr;
}

const char* collective_name(uint32_t kind) {
  switch (kind) {
    case kSimdgroupBarrier:
      return "simdgroup_barrier";
    case kMatrixMultiply:
      return "matrix multiplication";
    case kTensorMultiply:
      return "tensor operation";
    default:
      return "simd collective";
  }
}

// Release the lanes that wait in collectives. Lanes of one collective are released together; under strict checks the whole simdgroup must be in it.
bool release_collectives(Simdgroup& s) {
  Launch& launch = *runtime.launch;
  Fiber* lanes = &runtime.fibers[s.first];
  s.round++;
  bool together = s.uniform && s.arrived == s.lanes;
  uint32_t left = 0;
  for (uint32_t i = 0; i < s.lanes; i++) left |= static_cast<uint32_t>(lanes[i].state == State::kCollective) << i;
  s.arrived = 0;
  while (left) {
    Fiber& first = lanes[__builtin_ctz(left)];
    uint32_t mask = left;
    if (!together) {
      mask = 0;
      for (uint32_t i = 0; i < s.lanes; i++) {
        if ((left >> i & 1) && lanes[i].kind == first.kind && lanes[i].line == first.line) mask |= 1u << i;
      }
    }
    left &= ~mask;
    launch.simd_ops++;
    bool multiplies = first.kind == kMatrixMultiply || first.kind == kTensorMultiply;
    bool needs_all = first.kind == kSimdgroupBarrier || multiplies || launch.strict;
    if (launch.checked && needs_all && !together) {
      fail_in(&first, "divergence: %s reached by some lanes only (mask %#x)", collective_name(first.kind), mask);
      return false;
    }
    if (multiplies) {
      if (s.lanes != kSimdWidth) {
        fail_in(&first, "%s in an incomplete simdgroup (mask %#x)", collective_name(first.kind), mask);
        return false;
      }
      first.kind == kMatrixMultiply ? multiply(s) : multiply_tensors(s);
    }
    for (uint32_t i = 0; i < s.lanes; i++) {
      if (!(mask >> i & 1)) continue;
      lanes[i].mask = mask;
      lanes[i].state = State::kReady;
    }
  }
  return true;
}

enum class Progress { kBlocked, kPaused, kFailed };

// Run a simdgroup until all of its lanes wait at a barrier or have returned; in lockstep only up to its next collective.
Progress run_simdgroup(Simdgroup& s) {
  Fiber* lanes = &runtime.fibers[s.first];
  for (;;) {
    for (uint32_t i = 0; i < s.lanes; i++) runtime.order[i] = lanes + i;
    runtime.order_size = s.lanes;
    runtime.cursor = 0;
    arrange(runtime.order, s.lanes);
    while (runtime.cursor < runtime.order_size) {
      Fiber* next = runtime.order[runtime.cursor++];
      if (next->state != State::kReady) continue;
      switch_to_fiber(next);
      runtime.current = nullptr;
      if (runtime.failed) return Progress::kFailed;
    }
    if (runtime.attention) attend();
    if (runtime.failed) return Progress::kFailed;
    if (runtime.launch->instructions) count_instructions();
    if (s.arrived == 0) return Progress::kBlocked;
    if (!release_collectives(s)) return Progress::kFailed;
    if (runtime.launch->schedule == Schedule::kLockstep) return Progress::kPaused;
  }
}

// Called when all threads wait at a barrier or have returned. Check that they agree, and open the barrier. False: the threadgroup is finished.
bool open_barrier() {
  Launch& launch = *runtime.launch;
  Fiber* waiting = nullptr;
  uint32_t returned = 0;
  for (uint32_t i = 0; i < runtime.threads; i++) {
    Fiber& fiber = runtime.fibers[i];
    Fiber& first = runtime.fibers[i / kSimdWidth * kSimdWidth];
    if (launch.checked && fiber.matrix_accesses != first.matrix_accesses) {
      Fiber& more = fiber.matrix_accesses > first.matrix_accesses ? fiber : first;
      more.pc = more.matrix_pc;
      fail_in(&more, "divergence: %s by some lanes only (lane %u took a different number)", "simdgroup_load or simdgroup_store", i % kSimdWidth);
      return false;
    }
    if (fiber.state == State::kDone) {
      returned++;
    } else if (!waiting) {
      waiting = &fiber;
    } else if (fiber.line != waiting->line) {
      runtime.current = &fiber;
      record_failure(
          fiber.pc, "barrier divergence: threads wait at different barriers (lines %u and %u)", line_of(waiting->line), line_of(fiber.line));
      runtime.current = nullptr;
      return false;
    }
  }
  if (!waiting) return false;
  if (returned && launch.strict && launch.checked) {
    runtime.current = waiting;
    record_failure(
        waiting->pc, "barrier divergence: %u threads reach the barrier at line %u, %u have already returned", runtime.threads - returned,
        line_of(waiting->line), returned);
    runtime.current = nullptr;
    return false;
  }
  launch.barriers++;
  if (waiting->mem_flags & kMemThreadgroup) runtime.threadgroup_epoch++;
  if (waiting->mem_flags & kMemDevice) runtime.device_epoch++;
  for (uint32_t i = 0; i < runtime.threads; i++) {
    if (runtime.fibers[i].state == State::kBarrier) runtime.fibers[i].state = State::kReady;
  }
  return true;
}

void run_threadgroup() {
  std::vector<Simdgroup*> order;
  do {
    order.clear();
    for (Simdgroup& s : runtime.simdgroups) order.push_back(&s);
    arrange(order, order.size());
    while (!order.empty()) {
      std::vector<Simdgroup*> paused;
      for (Simdgroup* s : order) {
        Progress progress = run_simdgroup(*s);
        if (progress == Progress::kFailed) return;
        if (progress == Progress::kPaused) paused.push_back(s);
      }
      order.swap(paused);
    }
  } while (open_barrier());
  if (!runtime.failed) finish_pending_write();
}

Extent extent(const uint32_t* xyz) {
  return {xyz[0], xyz[1], xyz[2], 0};
}

void set_up_threads(Extent group, Extent groups, const std::vector<void*>& buffers, const std::vector<void*>& threadgroup_buffers) {
  Launch& launch = *runtime.launch;
  Extent full = extent(launch.threadgroup), grid = extent(launch.grid);
  Extent size{
      std::min(full.x, grid.x - group.x * full.x), std::min(full.y, grid.y - group.y * full.y), std::min(full.z, grid.z - group.z * full.z), 0};
  runtime.threads = size.x * size.y * size.z;
  launch.threads += runtime.threads;
  launch.threadgroups++;
  uint32_t simdgroups = (runtime.threads + kSimdWidth - 1) / kSimdWidth;
  runtime.simdgroups.resize(simdgroups);
  for (uint32_t i = 0; i < simdgroups; i++) {
    runtime.simdgroups[i].first = i * kSimdWidth;
    runtime.simdgroups[i].lanes = std::min(kSimdWidth, runtime.threads - i * kSimdWidth);
    runtime.simdgroups[i].round = runtime.simdgroups[i].arrived = 0;
  }
  for (uint32_t i = 0; i < runtime.threads; i++) {
    Fiber& fiber = runtime.fibers[i];
    fiber.state = State::kReady;
    fiber.matrix_accesses = 0;
    fiber.line = 0;
    fiber.pc = nullptr;
    fiber.threadgroup_low = fiber.device_low = i;
    ThreadContext& c = fiber.context;
    c.buffers = const_cast<void**>(buffers.data());
    c.threadgroup_buffers = const_cast<void**>(threadgroup_buffers.data());
    c.position_in_threadgroup = {i % size.x, i / size.x % size.y, i / size.x / size.y, 0};
    c.threadgroup_position = group;
    c.threadgroups = groups;
    c.grid = grid;
    c.threadgroup_size = size;
    c.dispatch_threadgroup_size = full;
    c.position_in_grid = {
        group.x * full.x + c.position_in_threadgroup.x, group.y * full.y + c.position_in_threadgroup.y,
        group.z * full.z + c.position_in_threadgroup.z, 0};
    c.index_in_threadgroup = i;
    c.lane = i % kSimdWidth;
    c.simdgroup = i / kSimdWidth;
    c.simdgroups = simdgroups;
    c.dispatch_simdgroups = (full.x * full.y * full.z + kSimdWidth - 1) / kSimdWidth;
    prepare_fiber(i);
  }
}

// The address range of the kernel's library in memory.
void find_image(const void* entry) {
  Dl_info info{};
  dladdr(entry, &info);
  runtime.image_begin = static_cast<const uint8_t*>(info.dli_fbase);
  struct Search {
    uint64_t base, end;
  } search{reinterpret_cast<uint64_t>(info.dli_fbase), 0};
  dl_iterate_phdr(
      [](dl_phdr_info* image, size_t, void* data) {
        Search& s = *static_cast<Search*>(data);
        if (image->dlpi_addr != s.base) return 0;
        for (int i = 0; i < image->dlpi_phnum; i++) {
          const auto& header = image->dlpi_phdr[i];
          if (header.p_type == PT_LOAD) s.end = std::max<uint64_t>(s.end, s.base + header.p_vaddr + header.p_memsz);
        }
        return 1;
      },
      &search);
  runtime.image_end = reinterpret_cast<const uint8_t*>(search.end);
}

bool within_limits(const Launch& launch) {
  uint64_t threads = static_cast<uint64_t>(launch.threadgroup[0]) * launch.threadgroup[1] * launch.threadgroup[2];
  if (threads > kMaxThreads)
    record_failure(nullptr, "threadgroup of %lu threads, at most %u", threads, kMaxThreads);
  else if (launch.buffer_count > kMaxBuffers)
    record_failure(nullptr, "%u buffers, at most %u", launch.buffer_count, kMaxBuffers);
  else if (threads == 0)
    record_failure(nullptr, "empty threadgroup");
  return !runtime.failed;
}

void run_grid() {
  Launch& launch = *runtime.launch;
  Extent groups{
      (launch.grid[0] + launch.threadgroup[0] - 1) / launch.threadgroup[0], (launch.grid[1] + launch.threadgroup[1] - 1) / launch.threadgroup[1],
      (launch.grid[2] + launch.threadgroup[2] - 1) / launch.threadgroup[2], 0};
  std::vector<void*> buffers, threadgroup_buffers(launch.threadgroup_buffer_count);
  for (uint32_t i = 0; i < launch.buffer_count; i++) buffers.push_back(launch.buffers[i].data);
  std::vector<uint64_t> order(static_cast<uint64_t>(groups.x) * groups.y * groups.z);
  for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
  if (!order.empty()) arrange(order, order.size());
  uint32_t threadgroup_bytes = 0;
  for (uint64_t index : order) {
    begin_threadgroup_memory();
    runtime.device_first_epoch = ++runtime.device_epoch;
    for (uint32_t i = 0; i < launch.threadgroup_buffer_count; i++) {
      threadgroup_buffers[i] = declare_threadgroup_variable(-1 - static_cast<int64_t>(i), launch.threadgroup_buffer_bytes[i], "argument", nullptr);
    }
    Extent group{
        static_cast<uint32_t>(index % groups.x), static_cast<uint32_t>(index / groups.x % groups.y),
        static_cast<uint32_t>(index / groups.x / groups.y), 0};
    set_up_threads(group, groups, buffers, threadgroup_buffers);
    run_threadgroup();
    threadgroup_bytes = std::max(threadgroup_bytes, launch.threadgroup_bytes);
    if (runtime.failed) break;
  }
  launch.threadgroup_bytes = threadgroup_bytes;
}

// Let the processor treat subnormal float32 operands and results as zeros, as GPUs do, while this lives. Conversions from half keep them, as on GPUs.
class SubnormalsFlushed {
 public:
  explicit SubnormalsFlushed(bool wanted) : before(control()) {
#if defined(__x86_64__)
    if (wanted) set_control(before | 0x8040u);  // flush to zero, denormals are zeros
#elif defined(__aarch64__)
    if (wanted) set_control(before | 1u << 24);
#endif
  }
  ~SubnormalsFlushed() {
    set_control(before);
  }
  SubnormalsFlushed(const SubnormalsFlushed&) = delete;
  SubnormalsFlushed& operator=(const SubnormalsFlushed&) = delete;

 private:
#if defined(__x86_64__)
  static uint32_t control() {
    return __builtin_ia32_stmxcsr();
  }
  static void set_control(uint32_t value) {
    __builtin_ia32_ldmxcsr(value);
  }
  uint32_t before;
#elif defined(__aarch64__)
  static uint64_t control() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(uint64_t value) {
    asm volatile("msr fpcr, %0" : : "r"(value));
  }
  uint64_t before;
#endif
};

}  // namespace

}  // namespace mslcpu

using namespace mslcpu;

#pragma GCC visibility push(default)

extern "C" {

int mslcpu_run(Launch* launch) {
  runtime.launch = launch;
  runtime.current = nullptr;
  runtime.failed = runtime.timed_out = runtime.attention = false;
  runtime.random = launch->seed * 2654435761u + 88172645463325252ull;
  find_image(reinterpret_cast<const void*>(launch->entry));
  if (!within_limits(*launch)) return 1;
  uint32_t threads = launch->threadgroup[0] * launch->threadgroup[1] * launch->threadgroup[2];
  reserve_stacks(threads, launch->stack_bytes);
  runtime.fibers.resize(threads);
  reset_threadgroup_epochs_if_used_up();
  if (launch->checked) begin_device_memory();
  forget_accesses();
  start_watchdog(launch->timeout);
  {
    SubnormalsFlushed flushed(launch->checked && launch->inexact);
    run_grid();
  }
  stop_watchdog();
  runtime.current = nullptr;
  if (launch->checked) end_device_memory();
  return launch->failed;
}

// Memory for a checked buffer, far from all others: a stray access up to `gap` bytes away from it hits no buffer.
constexpr uint64_t kGap = 1ull << 30;

uint8_t* mslcpu_allocate(uint64_t bytes) {
  uint64_t pages = (bytes + 4095) & ~4095ull;
  void* memory = mmap(nullptr, pages + 2 * kGap, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  uint8_t* data = static_cast<uint8_t*>(memory) + kGap;
  if (pages) mprotect(data, pages, PROT_READ | PROT_WRITE);
  return data;
}

void mslcpu_free(uint8_t* data, uint64_t bytes) {
  munmap(data - kGap, ((bytes + 4095) & ~4095ull) + 2 * kGap);
}

uint64_t mslcpu_launch_size(void) {
  return sizeof(Launch);
}

}  // extern "C"
