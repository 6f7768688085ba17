#include "cpu/lens_compare.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/split_vocab.h"
#include "cpu/token_block.h"

namespace metalens::cpu {
namespace {

// The rows of a block of tokens: those of every layer of a, then those of b.
class Task {
 public:
  Task(const Head& head_a, const Head& head_b, const LensCompareInput& in, Precision precision, TokenBlock block)
      : head_a_(head_a),
        head_b_(head_b),
        in_(in),
        block_(block),
        rows_a_(in.a.layers * block.tokens),
        rows_b_(in.b.layers * block.tokens),
        product_(head_a.u, head_a.u, precision),
        x_(rows_a_ * head_a.u.cols + rows_b_ * head_b.u.cols),
        logits_((rows_a_ + rows_b_) * kVocabularyBlock),
        sums_(rows_a_) {
    copy_rows(in.a, head_a.u.cols, x_.data());
    float* x_b = x_.data() + rows_a_ * head_a.u.cols;
    copy_rows(in.b, head_b.u.cols, x_b);
    product_.set_rows(x_.data(), shared() ? rows_a_ + rows_b_ : rows_a_);
    if (shared()) return;
    product_b_ = std::make_unique<BlockProduct>(head_b.u, head_b.u, precision);
    product_b_->set_rows(x_b, rows_b_);
  }

  void run(VocabularyRange range) {
    for (int64_t first = range.first; first < range.last; first += kVocabularyBlock) {
      const int64_t width = std::min(kVocabularyBlock, range.last - first);
      product_.forward(first, width, logits_.data());
      if (product_b_) product_b_->forward(first, width, logits(rows_a_));
      for (int64_t r = 0; r < rows_a_ + rows_b_; ++r) to_logits(r < rows_a_ ? head_a_ : head_b_, first, logits(r), width);
      for (int64_t r = 0; r < rows_a_; ++r) {
        const int64_t other = partner(r);
        kernels().compare_add(logits(r), logits(rows_a_ + other), width, lse(in_.a, r), lse(in_.b, other), sums_[r]);
      }
    }
  }

  void merge(const Task& other) {
    for (int64_t r = 0; r < rows_a_; ++r) {
      sums_[r].kl += other.sums_[r].kl;
      sums_[r].reverse_kl += other.sums_[r].reverse_kl;
      sums_[r].js += other.sums_[r].js;
      sums_[r].difference += other.sums_[r].difference;
    }
  }

  void write(const LensCompareOutput& out) const {
    for (int64_t r = 0; r < rows_a_; ++r) {
      const int64_t at = index(r);
      out.kl[at] = float(sums_[r].kl);
      out.reverse_kl[at] = float(sums_[r].reverse_kl);
      out.js[at] = float(sums_[r].js / 2);
      out.tv[at] = float(sums_[r].difference / 2);
    }
  }

 private:
  bool shared() const {
    return &head_a_ == &head_b_;
  }

  // The row of b that is compared with row r of a.
  int64_t partner(int64_t r) const {
    return in_.b.layers == 1 ? r % block_.tokens : r;
  }

  // The place of a row of this block among those of all tokens.
  int64_t index(int64_t r) const {
    return r / block_.tokens * in_.tokens + block_.first + r % block_.tokens;
  }

  float lse(const LensRows& rows, int64_t r) const {
    return rows.lse[index(r)];
  }

  float* logits(int64_t r) const {
    return logits_.data() + r * kVocabularyBlock;
  }

  void copy_rows(const LensRows& rows, int64_t d, float* to) const {
    for (int64_t l = 0; l < rows.layers; ++l) {
      std::copy_n(rows.n + (l * in_.tokens + block_.first) * d, block_.tokens * d, to + l * block_.tokens * d);
    }
  }

  const Head& head_a_;
  const Head& head_b_;
  const LensCompareInput& in_;
  TokenBlock block_;
  int64_t rows_a_, rows_b_;
  BlockProduct product_;
  std::unique_ptr<BlockProduct> product_b_;  // null if product_ has the rows of both
  Buffer<float> x_, logits_;
  std::vector<CompareSums> sums_;
};

}  // namespace

void lens_compare(const Head& head_a, const Head& head_b, const LensCompareInput& in, Precision precision, const LensCompareOutput& out) {
  if (in.a.layers == 0 || in.tokens == 0) return;
  const TokenBlocks blocks(in.a.layers + in.b.layers, in.tokens);
  run_split<Task>(
      blocks.size(), head_a.vocab, [&](int64_t i) { return std::make_unique<Task>(head_a, head_b, in, precision, blocks[i]); },
      [&](int64_t, const Task& task) { task.write(out); });
}

}  // namespace metalens::cpu
