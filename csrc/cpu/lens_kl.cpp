#include "cpu/lens_kl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/flush_subnormals.h"
#include "cpu/split_vocab.h"
#include "cpu/token_block.h"

namespace metalens::cpu {
namespace {

// Usually there is one pass, with a softcap two. Further passes find the scale of rows that overflowed; a row that needs more than these is not
// finite.
constexpr int kMaxPasses = 5;

constexpr DeltaSums kEmptyDelta{0, 0, 0, -std::numeric_limits<float>::infinity()};

// The KL. Of two equal expressions, take the one that does not cancel: near the model the terms are tiny and all positive, far from it S is large.
double divergence(const DeltaSums& s) {
  return s.excess < 0.5 ? s.curvature + (std::log1p(s.excess) - s.excess) : std::log1p(s.excess) - s.linear;
}

// The state of a block's rows that a pass over the vocabulary reads, and that may change for another pass.
struct Pass {
  TokenBlock block;
  std::vector<float> shift;  // c for every lens row, layer by layer
  bool gradient;             // false: only the sums
};

class Task {
 public:
  Task(const Head& head, const LensKLInput& in, Precision precision, const Pass& pass)
      : head_(head),
        in_(in),
        pass_(pass),
        rows_(in.layers * pass.block.tokens),
        product_(head.u, head.u, precision),
        logits_((rows_ + pass.block.tokens) * kVocabularyBlock),
        p_(pass.block.tokens * kVocabularyBlock),
        slopes_(head.softcap ? rows_ * kVocabularyBlock : 0),
        sums_(rows_, kEmptyDelta) {
    const int64_t d = head.u.cols, tokens = pass.block.tokens;
    x_ = Buffer<float>((rows_ + tokens) * d);
    const float* model = in.n_model + pass.block.first * d;
    for (int64_t r = 0; r < rows_; ++r) {
      const float* lens = in.n + (r / tokens * in.tokens + pass.block.first + r % tokens) * d;
      for (int64_t i = 0; i < d; ++i) x_.data()[r * d + i] = lens[i] - model[r % tokens * d + i];
    }
    std::copy_n(model, tokens * d, x_.data() + rows_ * d);
    product_.set_rows(x_.data(), rows_ + tokens, tokens);
    if (pass.gradient) {
      gradient_ = Buffer<float>(rows_ * d);
      std::fill_n(gradient_.data(), rows_ * d, 0.0f);
    }
  }

  void run(VocabularyRange range) {
    const FlushSubnormals flush;  // terms of improbable ids, which add nothing to a sum
    const auto& table = kernels();
    const int64_t tokens = pass_.block.tokens;
    for (int64_t first = range.first; first < range.last; first += kVocabularyBlock) {
      const int64_t width = std::min(kVocabularyBlock, range.last - first);
      product_.forward(first, width, logits_.data());
      for (int64_t t = 0; t < tokens; ++t) {
        float* model = logits(rows_ + t);
        float* p = p_.data() + t * kVocabularyBlock;
        table.transform(model, head_.bias ? head_.bias + first : nullptr, width, head_.scale, 0);
        for (int64_t r = t; r < rows_; r += tokens) table.delta_transform(logits(r), model, width, head_.scale, head_.softcap, slope(r));
        table.transform(model, nullptr, width, 1, head_.softcap);
        if (head_.offset) table.transform(model, head_.offset + first, width, 1, 0);  // the differences do not see it
        table.log_probabilities(model, in_.lse[pass_.block.first + t], width, p);
        for (int64_t r = t; r < rows_; r += tokens) table.delta_add(logits(r), model, p, slope(r), width, pass_.shift[r], sums_[r]);
      }
      if (pass_.gradient) product_.backward(logits_.data(), rows_, first, width, gradient_.data());
    }
  }

  void merge(const Task& other) {
    for (int64_t r = 0; r < rows_; ++r) {
      sums_[r].excess += other.sums_[r].excess;
      sums_[r].linear += other.sums_[r].linear;
      sums_[r].curvature += other.sums_[r].curvature;
      sums_[r].top = std::max(sums_[r].top, other.sums_[r].top);
    }
    if (!pass_.gradient) return;
    for (int64_t i = 0; i < rows_ * head_.u.cols; ++i) gradient_.data()[i] += other.gradient_.data()[i];
  }

  const std::vector<DeltaSums>& sums() const {
    return sums_;
  }

  void write(float* kl, float* dn) const {
    const int64_t d = head_.u.cols, tokens = pass_.block.tokens;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t t = pass_.block.first + r % tokens, at = r / tokens * in_.tokens + t;
      const double excess = sums_[r].excess;
      kl[at] = float(divergence(sums_[r]));
      if (!dn) continue;
      const float of_sum = float(head_.scale / (1 + excess)), of_mean = float(-head_.scale * excess / (1 + excess));
      const float* sum = gradient_.data() + r * d;
      const float* mean = in_.mean ? in_.mean + t * d : nullptr;
      for (int64_t i = 0; i < d; ++i) dn[at * d + i] = of_sum * sum[i] + (mean ? of_mean * mean[i] : 0.0f);
    }
  }

 private:
  float* logits(int64_t r) const {
    return logits_.data() + r * kVocabularyBlock;
  }

  float* slope(int64_t r) const {
    return slopes_.data() ? slopes_.data() + r * kVocabularyBlock : nullptr;
  }

  const Head& head_;
  const LensKLInput& in_;
  const Pass& pass_;
  int64_t rows_;
  BlockProduct product_;
  Buffer<float> x_, logits_, p_, slopes_, gradient_;
  std::vector<DeltaSums> sums_;
};

// scale m . (n - n*): at most KL below lse - lse*, by Jensen's inequality.
std::vector<float> mean_differences(const Head& head, const LensKLInput& in, TokenBlock block) {
  const int64_t d = head.u.cols;
  std::vector<float> shift;
  for (int64_t l = 0; l < in.layers; ++l) {
    for (int64_t t = block.first; t < block.first + block.tokens; ++t) {
      const float *lens = in.n + (l * in.tokens + t) * d, *model = in.n_model + t * d, *mean = in.mean + t * d;
      double sum = 0;
      for (int64_t i = 0; i < d; ++i) sum += double(mean[i]) * (double(lens[i]) - model[i]);
      shift.push_back(float(head.scale * sum));
    }
  }
  return shift;
}

// Whether e may have overflowed with this shift. For a row that holds NaN or infinities no shift is better.
bool overflows(const DeltaSums& s) {
  return s.excess > 1e30 && std::isfinite(s.top);
}

// Prepare the pass that must follow the one that gave these sums, and return whether there is one. `exact`: the gradient needs S = 1, up to rounding.
bool prepare_next(Pass& pass, const std::vector<DeltaSums>& sums, bool exact, bool want_gradient) {
  bool settled = true;
  for (size_t r = 0; r < sums.size(); ++r) {
    if (overflows(sums[r])) {
      pass.shift[r] += sums[r].top;
      settled = false;
    } else if (exact && 1 + sums[r].excess <= 0.1 && std::isfinite(sums[r].linear)) {
      pass.shift[r] += float(sums[r].linear);  // rounding has lost S: go back to Jensen's bound, where S is at least 1
      settled = false;
    }
  }
  if (!settled) return true;
  if (pass.gradient || !want_gradient) return false;
  for (size_t r = 0; r < sums.size(); ++r) pass.shift[r] += float(std::log1p(sums[r].excess));
  return pass.gradient = true;
}

}  // namespace

void lens_kl(const Head& head, const LensKLInput& in, Precision precision, float* kl, float* dn) {
  if (in.layers == 0 || in.tokens == 0) return;
  const TokenBlocks blocks(in.layers, in.tokens);
  const bool exact = head.softcap != 0;
  std::vector<Pass> passes;
  for (int64_t i = 0; i < blocks.size(); ++i) {
    passes.push_back({blocks[i], exact ? std::vector<float>(in.layers * blocks[i].tokens) : mean_differences(head, in, blocks[i]), dn && !exact});
  }
  for (int round = 0; !passes.empty(); ++round) {
    std::vector<char> again(passes.size());
    run_split<Task>(
        int64_t(passes.size()), head.vocab, [&](int64_t i) { return std::make_unique<Task>(head, in, precision, passes[i]); },
        [&](int64_t i, const Task& task) {
          again[i] = round < kMaxPasses && prepare_next(passes[i], task.sums(), exact, dn != nullptr);
          if (!again[i]) task.write(kl, dn);
        });
    std::vector<Pass> left;
    for (size_t i = 0; i < passes.size(); ++i) {
      if (again[i]) left.push_back(std::move(passes[i]));
    }
    passes = std::move(left);
  }
}

}  // namespace metalens::cpu
