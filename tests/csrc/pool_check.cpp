// Checks the thread pool: every task runs once, calls from several threads take turns, and a task's exception reaches the caller.
#include <algorithm>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

using metalens::cpu::parallel_for;

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
  return all && caught && on ? 0 : 1;
}
