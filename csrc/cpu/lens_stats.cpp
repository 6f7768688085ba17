#include "cpu/lens_stats.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/softmax.h"
#include "cpu/split_vocab.h"
#include "cpu/token_block.h"

namespace metalens::cpu {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Candidate {
  float logit;
  int32_t id;
};

bool better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// The k largest logits of a row, in a heap with the smallest of them in front. Nearly every block has no logit above that one, and then costs one
// comparison of vectors.
class TopK {
 public:
  explicit TopK(int64_t k) : k_(k) {
  }

  void add(const float* z, int64_t first, int64_t n) {
    if (full() && kernels().count_above(z, n, heap_.front().logit) == 0) return;
    for (int64_t start = 0; start < n; start += kRun) {
      const int64_t end = std::min(n, start + kRun);
      if (full() && kernels().count_above(z + start, end - start, heap_.front().logit) == 0) continue;
      for (int64_t i = start; i < end; ++i) {
        if (!full() || z[i] > heap_.front().logit) add({z[i], int32_t(first + i)});
      }
    }
  }

  void merge(const TopK& other) {
    for (const Candidate& c : other.heap_) add(c);
  }

  const std::vector<Candidate>& sorted() {
    std::sort(heap_.begin(), heap_.end(), better);
    return heap_;
  }

 private:
  static constexpr int64_t kRun = 32;

  bool full() const {
    return int64_t(heap_.size()) == k_;
  }

  void add(Candidate c) {
    if (std::isnan(c.logit)) return;  // the whole row will be NaN
    if (full()) {
      if (!better(c, heap_.front())) return;
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.back() = c;
    } else {
      heap_.push_back(c);
    }
    std::push_heap(heap_.begin(), heap_.end(), better);
  }

  int64_t k_;
  std::vector<Candidate> heap_;
};

// One row over one split of the vocabulary.
struct Row {
  explicit Row(int64_t k) : top(k) {
  }

  SoftmaxSums softmax = kEmptySoftmax;
  TopK top;
  double cross = 0;    // sum of exp(z_model - top of the model) (z_model - z)
  double reverse = 0;  // sum of exp(z - top) (z - z_model)
};

// The rows of a block of tokens: those of every layer, then the model's own.
class Task {
 public:
  Task(const Head& head, const LensStatsInput& in, Precision precision, TokenBlock block)
      : head_(head), in_(in), block_(block), product_(head.u, head.u, precision), lens_rows_(in.layers * block.tokens) {
    const int64_t d = head.u.cols, rows = lens_rows_ + (in.n_model ? block.tokens : 0);
    x_ = Buffer<float>(rows * d);
    for (int64_t l = 0; l < in.layers; ++l) {
      std::copy_n(in.n + (l * in.tokens + block.first) * d, block.tokens * d, x_.data() + l * block.tokens * d);
    }
    if (in.n_model) std::copy_n(in.n_model + block.first * d, block.tokens * d, x_.data() + lens_rows_ * d);
    product_.set_rows(x_.data(), rows);
    rows_.assign(rows, Row(in.k));
    if (in.labels) above_.assign(lens_rows_ * in.labels_per_token, 0);
    logits_ = Buffer<float>(rows * kVocabularyBlock);
  }

  void run(VocabularyRange range) {
    const auto& table = kernels();
    std::vector<float> label_logits;
    if (in_.labels) label_logits = logits_of_labels();
    std::vector<float> weights(in_.n_model ? kVocabularyBlock : 0);
    float* const lens_weights = in_.reverse_kl ? weights.data() : nullptr;
    for (int64_t first = range.first; first < range.last; first += kVocabularyBlock) {
      const int64_t width = std::min(kVocabularyBlock, range.last - first);
      product_.forward(first, width, logits_.data());
      for (size_t r = 0; r < rows_.size(); ++r) to_logits(head_, first, logits(r), width);
      for (int64_t r = 0; r < lens_rows_; ++r) {
        Row& row = rows_[r];
        const float shrink = table.softmax_add(logits(r), first, width, row.softmax, lens_weights);
        if (in_.reverse_kl) {
          const float* model = logits(lens_rows_ + r % block_.tokens);
          row.reverse = row.reverse * shrink + table.weighted_difference(lens_weights, logits(r), model, width);
        }
        row.top.add(logits(r), first, width);
        for (int64_t i = r * in_.labels_per_token; i < int64_t(label_logits.size()) && i < (r + 1) * in_.labels_per_token; ++i) {
          above_[i] += table.count_above(logits(r), width, label_logits[i]);
        }
      }
      if (!in_.n_model) continue;
      for (int64_t t = 0; t < block_.tokens; ++t) {
        const int64_t model = lens_rows_ + t;
        const float shrink = table.softmax_add(logits(model), first, width, rows_[model].softmax, weights.data());
        for (int64_t r = t; r < lens_rows_; r += block_.tokens) {
          rows_[r].cross = rows_[r].cross * shrink + table.weighted_difference(weights.data(), logits(model), logits(r), width);
        }
      }
    }
  }

  // Add the results of another task, for another split of the vocabulary.
  void merge(const Task& other) {
    for (int64_t t = 0; in_.n_model && t < block_.tokens; ++t) {
      const int64_t model = lens_rows_ + t;
      const auto [mine, theirs] = rescaling(rows_[model].softmax, other.rows_[model].softmax);
      for (int64_t r = t; r < lens_rows_; r += block_.tokens) rows_[r].cross = mine * rows_[r].cross + theirs * other.rows_[r].cross;
    }
    for (size_t r = 0; r < rows_.size(); ++r) {
      const auto [mine, theirs] = rescaling(rows_[r].softmax, other.rows_[r].softmax);
      rows_[r].reverse = mine * rows_[r].reverse + theirs * other.rows_[r].reverse;
      rows_[r].softmax = merged(rows_[r].softmax, other.rows_[r].softmax);
      rows_[r].top.merge(other.rows_[r].top);
    }
    for (size_t i = 0; i < above_.size(); ++i) above_[i] += other.above_[i];
  }

  void write(const LensStatsOutput& out) {
    const auto label_logits = in_.labels ? logits_of_labels() : std::vector<float>();
    for (int64_t r = 0; r < lens_rows_; ++r) {
      Row& row = rows_[r];
      const int64_t t = block_.first + r % block_.tokens;
      const int64_t at = r / block_.tokens * in_.tokens + t;
      const double lse = log_sum(row.softmax);
      out.lse[at] = float(lse);
      out.entropy[at] = float(entropy(row.softmax));
      out.max_probability[at] = float(1 / row.softmax.sum);
      const auto& best = row.top.sorted();
      const bool finite = !std::isnan(row.softmax.sum);
      for (int64_t i = 0; i < in_.k; ++i) {
        out.top_ids[at * in_.k + i] = finite ? best[i].id : int32_t(i);
        out.top_logits[at * in_.k + i] = finite ? best[i].logit : kNaN;
      }
      for (int64_t i = 0; in_.labels && i < in_.labels_per_token; ++i) {
        const bool known = is_token(label(r, i));
        const int64_t from = r * in_.labels_per_token + i, to = at * in_.labels_per_token + i;
        out.nll[to] = known ? float(lse - label_logits[from]) : kNaN;
        out.rank[to] = known ? int32_t(1 + above_[from]) : -1;
      }
      if (in_.n_model) {
        const SoftmaxSums& model = rows_[lens_rows_ + r % block_.tokens].softmax;
        out.kl[at] = float(row.cross / model.sum + (lse - log_sum(model)));
        out.agrees[at] = finite && row.softmax.best == model.best;
        if (in_.reverse_kl) out.reverse_kl[at] = float(row.reverse / row.softmax.sum + (log_sum(model) - lse));
      }
    }
  }

 private:
  float* logits(int64_t r) const {
    return logits_.data() + r * kVocabularyBlock;
  }

  int64_t label(int64_t r, int64_t i) const {
    return in_.labels[(block_.first + r % block_.tokens) * in_.labels_per_token + i];
  }

  bool is_token(int64_t id) const {
    return id >= 0 && id < head_.vocab;
  }

  // The logits [rows of lenses, labels_per_token] of the labels, NaN for labels that are no tokens.
  std::vector<float> logits_of_labels() const {
    std::vector<float> z(lens_rows_ * in_.labels_per_token, kNaN);
    for (int64_t r = 0; r < lens_rows_; ++r) {
      for (int64_t i = 0; i < in_.labels_per_token; ++i) {
        if (!is_token(label(r, i))) continue;
        float& logit = z[r * in_.labels_per_token + i];
        logit = product_.forward_one(x_.data() + r * head_.u.cols, label(r, i));
        to_logits(head_, label(r, i), &logit, 1);
      }
    }
    return z;
  }

  const Head& head_;
  const LensStatsInput& in_;
  TokenBlock block_;
  BlockProduct product_;
  int64_t lens_rows_;
  Buffer<float> x_, logits_;
  std::vector<Row> rows_;
  std::vector<int64_t> above_;  // [rows of lenses, labels_per_token] logits larger than the label's
};

}  // namespace

void lens_stats(const Head& head, const LensStatsInput& in, Precision precision, const LensStatsOutput& out) {
  if (in.layers == 0 || in.tokens == 0) return;
  const TokenBlocks blocks(in.layers, in.tokens);
  run_split<Task>(
      blocks.size(), head.vocab, [&](int64_t i) { return std::make_unique<Task>(head, in, precision, blocks[i]); },
      [&](int64_t, Task& task) { task.write(out); });
}

}  // namespace metalens::cpu
