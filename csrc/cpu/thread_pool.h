// One pool of worker threads for all kernels of the process.
#pragma once

#include <cstdint>
#include <functional>

namespace metalens::cpu {

// Threads that parallel_for uses, the calling one included: METALENS_NUM_THREADS, or else the cores this process may run on.
int num_threads();

// Run task(0) ... task(count - 1) on the pool and the calling thread; return when all are done. Tasks are handed out in order, one at a time. An
// exception thrown by a task is rethrown here, after the others have finished. Calls from several threads take turns: running them side by side would
// only oversubscribe the cores. A task must not call parallel_for. After fork() the child gets a pool of its own.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

}  // namespace metalens::cpu
