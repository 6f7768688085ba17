// Fibers: a stack for each GPU thread, and a hand-written switch between stacks.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "state.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl mslcpu_switch
.hidden mslcpu_switch
.type mslcpu_switch, @function
mslcpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr size_t kSavedRegisters = 6;  // below the return address
#elif defined(__aarch64__)
asm(R"(
.text
.globl mslcpu_switch
.hidden mslcpu_switch
.type mslcpu_switch, @function
mslcpu_switch:
  sub sp, sp, #176
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
)");
#else
#error "mslcpu: no fiber switch for this processor"
#endif

namespace mslcpu {

namespace {

constexpr size_t kPage = 4096;

void thread_main() {
  runtime.launch->entry(&runtime.current->context);
  runtime.current->state = State::kDone;
  yield_fiber();
  abort();  // a finished fiber is never resumed
}

}  // namespace

void reserve_stacks(uint32_t threads, uint32_t stack_bytes) {
  size_t stride = (stack_bytes + kPage - 1) / kPage * kPage + kPage;  // one guard page
  if (runtime.stack_bytes == stride && runtime.stacks_bytes >= stride * threads) return;
  if (runtime.stacks) munmap(runtime.stacks, runtime.stacks_bytes);
  runtime.stack_bytes = stride;
  runtime.stacks_bytes = stride * threads;
  void* memory = mmap(nullptr, runtime.stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  runtime.stacks = static_cast<uint8_t*>(memory);
  for (uint32_t i = 0; i < threads; i++) mprotect(runtime.stacks + i * stride, kPage, PROT_NONE);
}

void prepare_fiber(uint32_t index) {
  // Stacks start at different offsets within their pages. Otherwise the busy ends of all stacks would compete for the same cache sets.
  size_t color = (index * 5 % 32) * 128;
  uint64_t* top = reinterpret_cast<uint64_t*>(runtime.stacks + (index + 1) * runtime.stack_bytes - color) - 8;
#if defined(__x86_64__)
  *--top = 0;  // so that thread_main finds the alignment that a call leaves
  *--top = reinterpret_cast<uint64_t>(&thread_main);
  top -= kSavedRegisters;
  memset(top, 0, kSavedRegisters * sizeof(uint64_t));
#else
  top -= 22;
  memset(top, 0, 176);
  top[11] = reinterpret_cast<uint64_t>(&thread_main);  // x30
#endif
  runtime.fibers[index].stack_pointer = top;
}

void switch_to_fiber(Fiber* fiber) {
  runtime.current = fiber;
  runtime.launch->switches++;
  mslcpu_switch(&runtime.scheduler_stack_pointer, fiber->stack_pointer);
}

void yield_fiber() {
  Fiber* self = runtime.current;
  if (!runtime.failed) {
    while (runtime.cursor < runtime.order_size) {
      Fiber* next = runtime.order[runtime.cursor++];
      if (next->state != State::kReady) continue;
      runtime.current = next;
      runtime.launch->switches++;
      mslcpu_switch(&self->stack_pointer, next->stack_pointer);
      return;
    }
  }
  mslcpu_switch(&self->stack_pointer, runtime.scheduler_stack_pointer);
}

}  // namespace mslcpu
