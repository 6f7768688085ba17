#include "cpu/lens_target.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/softmax.h"
#include "cpu/split_vocab.h"
#include "cpu/token_block.h"

namespace metalens::cpu {
namespace {

// A block of tokens over a split of the vocabulary: the softmax and, relative to the largest logit so far, the weighted sum of U's rows.
class Task {
 public:
  Task(const Head& head, const float* n_model, Precision precision, TokenBlock block, bool with_mean)
      : head_(head),
        block_(block),
        with_mean_(with_mean),
        product_(head.u, head.u, precision),
        softmax_(block.tokens, kEmptySoftmax),
        logits_(block.tokens * kVocabularyBlock),
        mean_(with_mean ? block.tokens * head.u.cols : 0) {
    product_.set_rows(n_model + block.first * head.u.cols, block.tokens, block.tokens);
    if (with_mean) std::fill_n(mean_.data(), block.tokens * head.u.cols, 0.0f);
  }

  void run(VocabularyRange range) {
    const auto& table = kernels();
    for (int64_t first = range.first; first < range.last; first += kVocabularyBlock) {
      const int64_t width = std::min(kVocabularyBlock, range.last - first);
      product_.forward(first, width, logits_.data());
      for (int64_t t = 0; t < block_.tokens; ++t) {
        float* z = logits_.data() + t * kVocabularyBlock;
        to_logits(head_, first, z, width);
        const float shrink = table.softmax_add(z, first, width, softmax_[t], z);
        if (with_mean_ && shrink != 1) scale(t, shrink);
      }
      if (with_mean_) product_.backward(logits_.data(), block_.tokens, first, width, mean_.data());
    }
  }

  void merge(const Task& other) {
    for (int64_t t = 0; t < block_.tokens; ++t) {
      const auto [mine, theirs] = rescaling(softmax_[t], other.softmax_[t]);
      softmax_[t] = merged(softmax_[t], other.softmax_[t]);
      if (!with_mean_) continue;
      scale(t, float(mine));
      for (int64_t i = 0; i < head_.u.cols; ++i) row(t)[i] += float(theirs) * other.row(t)[i];
    }
  }

  void write(const LensTargetOutput& out) {
    for (int64_t t = 0; t < block_.tokens; ++t) {
      out.lse[block_.first + t] = float(log_sum(softmax_[t]));
      out.entropy[block_.first + t] = float(entropy(softmax_[t]));
      if (!with_mean_) continue;
      scale(t, float(1 / softmax_[t].sum));
      std::copy_n(row(t), head_.u.cols, out.mean + (block_.first + t) * head_.u.cols);
    }
  }

 private:
  float* row(int64_t t) const {
    return mean_.data() + t * head_.u.cols;
  }

  void scale(int64_t t, float factor) {
    for (int64_t i = 0; i < head_.u.cols; ++i) row(t)[i] *= factor;
  }

  const Head& head_;
  TokenBlock block_;
  bool with_mean_;
  BlockProduct product_;
  std::vector<SoftmaxSums> softmax_;
  Buffer<float> logits_, mean_;
};

}  // namespace

void lens_target(const Head& head, const float* n_model, int64_t tokens, Precision precision, const LensTargetOutput& out) {
  if (tokens == 0) return;
  const TokenBlocks blocks(1, tokens);
  run_split<Task>(
      blocks.size(), head.vocab, [&](int64_t i) { return std::make_unique<Task>(head, n_model, precision, blocks[i], out.mean != nullptr); },
      [&](int64_t, Task& task) { task.write(out); });
}

}  // namespace metalens::cpu
