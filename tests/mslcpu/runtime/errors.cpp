// Failures. The first failure of a launch is recorded, and the thread that caused it is abandoned. Faults of the processor and the time limit arrive
// as signals and end in the same way.
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "state.h"

namespace mslcpu {

Runtime runtime;

void record_failure(const void* pc, const char* format, ...) {
  if (runtime.failed) return;
  runtime.failed = true;
  Launch& launch = *runtime.launch;
  launch.failed = 1;
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(launch.message, sizeof launch.message, format, arguments);
  va_end(arguments);
  if (runtime.current && length >= 0 && length < static_cast<int>(sizeof launch.message)) {
    const ThreadContext& c = runtime.current->context;
    snprintf(
        launch.message + length, sizeof launch.message - length, " [threadgroup (%u,%u,%u) thread (%u,%u,%u) simdgroup %u lane %u]",
        c.threadgroup_position.x, c.threadgroup_position.y, c.threadgroup_position.z, c.position_in_threadgroup.x, c.position_in_threadgroup.y,
        c.position_in_threadgroup.z, c.simdgroup, c.lane);
  }
  const uint8_t* at = static_cast<const uint8_t*>(pc);
  if (at >= runtime.image_begin && at < runtime.image_end) launch.fault_offset = at - runtime.image_begin;
}

void abandon_thread() {
  void* ignored;
  mslcpu_switch(&ignored, runtime.scheduler_stack_pointer);
  abort();
}

namespace {

// The signals that a kernel can cause, and the timer's signal.
const int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction old_faults[4], old_timer;
stack_t old_stack;
timer_t timer;
bool timer_set = false;

int timer_signal() {
  return SIGRTMIN + 7;
}

const void* interrupted_at(void* context) {
  const ucontext_t* u = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(u->uc_mcontext.gregs[REG_RIP]);
#else
  return reinterpret_cast<const void*>(u->uc_mcontext.pc);
#endif
}

bool in_kernel(const void* pc) {
  return runtime.current && pc >= runtime.image_begin && pc < runtime.image_end;
}

void on_fault(int number, siginfo_t* info, void* context) {
  const void* pc = interrupted_at(context);
  const uint8_t* address = static_cast<const uint8_t*>(info->si_addr);
  bool on_stack = address >= runtime.stacks && address < runtime.stacks + runtime.stacks_bytes;
  if (!in_kernel(pc) && !(runtime.current && on_stack)) {  // a fault of the runtime or of the host program: not handled here
    signal(number, SIG_DFL);
    return;
  }
  if (number == SIGFPE)
    record_failure(pc, "integer division by zero or overflow");
  else if (number == SIGILL)
    record_failure(pc, "execution reached code that cannot be reached");
  else if (on_stack)
    record_failure(pc, "stack overflow: thread memory exhausted (recursion, or very large arrays)");
  else
    record_failure(pc, "invalid memory access at address %p", info->si_addr);
  abandon_thread();
}

void on_timer(int, siginfo_t*, void* context) {
  runtime.timed_out = true;
  runtime.attention = true;
  const void* pc = interrupted_at(context);
  if (!in_kernel(pc)) return;  // the next callback or the next tick will see it
  record_failure(pc, "kernel did not finish within %g s", runtime.launch->timeout);
  abandon_thread();
}

}  // namespace

void start_watchdog(double seconds) {
  static uint8_t* signal_stack = static_cast<uint8_t*>(malloc(65536));
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = 65536;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // a handler may leave by switching stacks, so no signal stays blocked
  action.sa_sigaction = on_fault;
  for (int i = 0; i < 4; i++) sigaction(kFaults[i], &action, &old_faults[i]);
  timer_set = false;
  if (seconds <= 0) return;
  action.sa_flags |= SA_RESTART;
  action.sa_sigaction = on_timer;
  sigaction(timer_signal(), &action, &old_timer);
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = timer_signal();
  event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
  if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0) return;
  itimerspec when{};
  when.it_value.tv_sec = static_cast<time_t>(seconds);
  when.it_value.tv_nsec = static_cast<long>((seconds - static_cast<double>(when.it_value.tv_sec)) * 1e9);
  when.it_interval.tv_nsec = 3'000'000;
  timer_settime(timer, 0, &when, nullptr);
  timer_set = true;
}

void stop_watchdog() {
  if (timer_set) {
    timer_delete(timer);
    signal(timer_signal(), SIG_IGN);  // discards a signal that is already pending
    sigaction(timer_signal(), &old_timer, nullptr);
  }
  for (int i = 0; i < 4; i++) sigaction(kFaults[i], &old_faults[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace mslcpu
