#include "cpu/thread_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace metalens::cpu {
namespace {

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int configured_threads() {
  const char* text = std::getenv("METALENS_NUM_THREADS");
  if (!text || !*text) return usable_cores();
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end || n < 1 || n > 1024) {
    throw std::runtime_error("METALENS_NUM_THREADS=" + std::string(text) + " is not a number from 1 to 1024.");
  }
  return int(n);
}

// Return when happened() is true, or after 200 microseconds. Waking a sleeping thread takes longer than a product of two small matrices, and such
// products come in quick succession. The loop yields, so other threads get the core if they want it.
template <typename Happened>
void wait_a_little(const Happened& happened) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
  while (!happened() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

// The core that the calling thread is on; -1 where no system tells.
int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// A worker's thread, and the core that it was on when it began to wait.
struct Worker {
  std::thread thread;
  std::atomic<int> core{-1};
};

class Pool {
 public:
  explicit Pool(int threads) : pid_(getpid()), workers_(threads - 1) {
#if defined(__linux__)
    if (sched_getaffinity(0, sizeof(allowed_), &allowed_) != 0) CPU_ZERO(&allowed_);
#endif
    for (Worker& worker : workers_) worker.thread = std::thread([this, &worker] { work(worker); });
  }

  pid_t pid() const {
    return pid_;
  }

  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::lock_guard<std::mutex> turn(turn_);
    keep_off(current_core());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_ = 0;
      error_ = nullptr;
      ++round_;
    }
    wake_.notify_all();
    take(task, count);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = nullptr;  // all tasks are taken: a worker that has not woken up yet need not be waited for
    }
    wait_a_little([this] { return active_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // Move the workers that wait on a core, the caller's, to other cores. A waiting worker makes its core look busy. So a caller that slept may have
  // been woken on that very core while another was free, and the system would leave both there: the worker would begin when the caller is done.
  void keep_off([[maybe_unused]] int core) {
#if defined(__linux__)
    for (Worker& worker : workers_) {
      if (core < 0 || worker.core != core) continue;
      cpu_set_t others = allowed_;
      CPU_CLR(core, &others);
      if (CPU_COUNT(&others) > 0 && pthread_setaffinity_np(worker.thread.native_handle(), sizeof(others), &others) == 0) worker.core = -1;
    }
#endif
  }

  void work(Worker& worker) {
    for (uint64_t seen = 0;;) {
      worker.core = current_core();
      wait_a_little([&] { return round_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (!task_) continue;  // woken too late for this one; be awake for the next, which may come soon
      ++active_;
      const auto& task = *task_;
      const int64_t count = count_;
      lock.unlock();
      take(task, count);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  void take(const std::function<void(int64_t)>& task, int64_t count) {
    for (int64_t i; (i = next_.fetch_add(1)) < count;) {
      try {
        task(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  const pid_t pid_;
  std::vector<Worker> workers_;
#if defined(__linux__)
  cpu_set_t allowed_;  // cores that the workers may use
#endif
  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};  // workers that run the current tasks
  std::atomic<uint64_t> round_{0};
  std::exception_ptr error_;
};

// The pool, which is never destroyed: workers sleep in it until the process ends, and a forked child must not join threads that it does not have.
Pool& pool() {
  static std::mutex creation;
  static std::atomic<Pool*> current{nullptr};
  static const bool fork_safe [[maybe_unused]] = pthread_atfork([] { creation.lock(); }, [] { creation.unlock(); }, [] { creation.unlock(); }) == 0;
  Pool* p = current.load(std::memory_order_acquire);
  if (p && p->pid() == getpid()) return *p;
  std::lock_guard<std::mutex> lock(creation);
  p = current.load(std::memory_order_acquire);
  if (!p || p->pid() != getpid()) {
    p = new Pool(num_threads());
    current.store(p, std::memory_order_release);
  }
  return *p;
}

}  // namespace

int num_threads() {
  static const int n = configured_threads();
  return n;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 1 || num_threads() == 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
  } else {
    pool().run(count, task);
  }
}

}  // namespace metalens::cpu
