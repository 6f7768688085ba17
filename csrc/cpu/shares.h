// Work on blocks of rows, spread over threads: whole blocks where there are many, shares of the vocabulary where there are few.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/product.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {

// For every block i: task = make(i), task->run(whole vocabulary), finish(i, *task). With few blocks several tasks of one block take a share of the
// vocabulary each and are merged in the vocabulary's order. At most a few tasks per thread exist at a time, which bounds memory.
template <typename Task, typename Make, typename Finish>
void run_shared(int64_t blocks, int64_t vocab, const Make& make, const Finish& finish) {
  const int64_t shares = vocabulary_shares(vocab, blocks);
  if (shares == 1) {
    parallel_for(blocks, [&](int64_t i) {
      const std::unique_ptr<Task> task = make(i);
      task->run({0, vocab});
      finish(i, *task);
    });
    return;
  }
  std::vector<std::unique_ptr<Task>> tasks(blocks * shares);
  parallel_for(blocks * shares, [&](int64_t i) {
    tasks[i] = make(i / shares);
    tasks[i]->run(vocabulary_share(vocab, i % shares, shares));
  });
  parallel_for(blocks, [&](int64_t i) {
    Task& whole = *tasks[i * shares];
    for (int64_t share = 1; share < shares; ++share) whole.merge(*tasks[i * shares + share]);
    finish(i, whole);
  });
}

}  // namespace metalens::cpu
