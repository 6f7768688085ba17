// Work on blocks of rows, spread over threads. With many blocks a task takes a whole block; with few blocks the vocabulary is split too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {

// Vocabulary ids whose logits a task computes at a time.
constexpr int64_t kVocabularyBlock = kKeyBlock;

// Ids [first, last).
struct VocabularyRange {
  int64_t first;
  int64_t last;
};

// The ids of split number `split` out of `splits`: whole blocks.
VocabularyRange vocabulary_split(int64_t vocab, int64_t split, int64_t splits);

// The number of splits of the vocabulary that keeps all threads busy with `tasks` blocks of rows.
int64_t vocabulary_splits(int64_t vocab, int64_t tasks);

// For every block i: task = make(i), task->run(whole vocabulary), finish(i, *task). With few blocks, each block has several tasks that run on a split
// of the vocabulary and are merged in the order of the ids. At most a few tasks per thread exist at a time, which bounds memory.
template <typename Task, typename Make, typename Finish>
void run_split(int64_t blocks, int64_t vocab, const Make& make, const Finish& finish) {
  const int64_t splits = vocabulary_splits(vocab, blocks);
  if (splits == 1) {
    parallel_for(blocks, [&](int64_t i) {
      const std::unique_ptr<Task> task = make(i);
      task->run({0, vocab});
      finish(i, *task);
    });
    return;
  }
  std::vector<std::unique_ptr<Task>> tasks(blocks * splits);
  parallel_for(blocks * splits, [&](int64_t i) {
    tasks[i] = make(i / splits);
    tasks[i]->run(vocabulary_split(vocab, i % splits, splits));
  });
  parallel_for(blocks, [&](int64_t i) {
    Task& whole = *tasks[i * splits];
    for (int64_t split = 1; split < splits; ++split) whole.merge(*tasks[i * splits + split]);
    finish(i, whole);
  });
}

}  // namespace metalens::cpu
