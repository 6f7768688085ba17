// One pool of worker threads for all kernels of the process.
#pragma once

#include <cstdint>
#include <functional>

namespace metalens::cpu {

// The number of threads that parallel_for uses, the calling one included: METALENS_NUM_THREADS, or else the cores that this process may run on.
int num_threads();

// Run task(0) ... task(count - 1) on the pool and the calling thread, and return when all are done. Tasks are handed out in order, one at a time. If
// a task throws, the exception is rethrown here after the other tasks have finished. Calls from several threads take turns; side by side they would
// only oversubscribe the cores. A task must not call parallel_for. After fork() the child has a pool of its own.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

}  // namespace metalens::cpu
