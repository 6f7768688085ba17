// Checks the thread pool: every task runs once, calls from several threads take turns, and a task's exception reaches the caller,
// and no worker waits on the caller's core.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

#include "cpu/thread_pool.h"

using metalens::cpu::parallel_for;

#if defined(__linux__)
// Whether a worker that waits on the caller's core is moved off it, and may use all other cores.
bool keeps_off_the_callers_core() {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  const int threads = metalens::cpu::num_threads();
  if (threads < 2 || CPU_COUNT(&allowed) < 2) {
    std::puts("not checked on one core: that workers leave the caller's core");
    return true;
  }
  bool good = true;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed)) continue;
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(core, &here);
    const auto caller = std::this_thread::get_id();
    // Every thread takes one task: a task ends when all have begun.
    auto on_every_worker = [&](const auto& task) {
      std::atomic<int> begun{0};
      parallel_for(threads, [&](int64_t) {
        if (std::this_thread::get_id() != caller) task();
        for (++begun; begun < threads;) std::this_thread::yield();
      });
    };
    sched_setaffinity(0, sizeof(here), &here);
    on_every_worker([&] { sched_setaffinity(0, sizeof(here), &here); });
    std::atomic<int> moved{0};
    on_every_worker([&] {
      cpu_set_t now, others = allowed;
      CPU_CLR(core, &others);
      sched_getaffinity(0, sizeof(now), &now);
      moved += CPU_EQUAL(&now, &others);
    });
    good = good && moved == threads - 1;
    sched_setaffinity(0, sizeof(allowed), &allowed);
  }
  if (!good) std::puts("a worker waited on the caller's core");
  return good;
}
#else
bool keeps_off_the_callers_core() {
  return true;
}
#endif

int main() {
  // Several streams of MLX may call at once; they take turns on one pool.
  std::vector<int> turns(4);
  std::vector<std::thread> callers;
  for (int& count : turns) {
    callers.emplace_back([&count] {
      for (int i = 0; i < 50; ++i) {
        std::vector<int> done(17);
        parallel_for(17, [&](int64_t task) { done[task] += 1; });
        count += std::count(done.begin(), done.end(), 1) == 17;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  const bool all = std::count(turns.begin(), turns.end(), 50) == 4;
  if (!all) std::puts("some tasks did not run once");

  // An exception in a task reaches the caller, and the pool keeps working.
  bool caught = false;
  try {
    parallel_for(8, [](int64_t task) {
      if (task == 5) throw 5;
    });
  } catch (int) {
    caught = true;
  }
  if (!caught) std::puts("the exception of a task was lost");
  int after = 0;
  parallel_for(1, [&](int64_t) { ++after; });
  std::vector<int> done(9);
  parallel_for(9, [&](int64_t task) { done[task] = 1; });
  const bool on = after == 1 && std::count(done.begin(), done.end(), 1) == 9;
  if (!on) std::puts("the pool did not work on after an exception");
  return all && caught && on && keeps_off_the_callers_core() ? 0 : 1;
}
