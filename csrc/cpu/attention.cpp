#include "cpu/attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/softmax.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

constexpr int64_t kQueries = 64;  // queries of a task, from each head that shares its keys

Matrix dense(const float* values, int64_t rows, int64_t cols) {
  return {rows, cols, Element::f32, Format::dense, 0, 0, values, nullptr, nullptr};
}

// Queries [first, first + count) of all the heads that share one head of keys.
class Task {
 public:
  Task(const AttentionInput& in, Precision precision, int64_t batch, int64_t kv_head, int64_t first, int64_t count)
      : in_(in),
        group_(in.heads / in.kv_heads),
        head_(batch * in.heads + kv_head * group_),
        first_(first),
        count_(count),
        rows_(group_ * count),
        keys_(dense(in.k + (batch * in.kv_heads + kv_head) * in.keys * in.d, in.keys, in.d)),
        values_(dense(in.v + (batch * in.kv_heads + kv_head) * in.keys * in.d_value, in.keys, in.d_value)),
        product_(keys_, values_, precision),
        x_(rows_ * in.d),
        logits_(rows_ * kKeyBlock),
        sums_(rows_ * in.d_value),
        softmax_(rows_, kEmptySoftmax) {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* q = in.q + query(r) * in.d;
      for (int64_t i = 0; i < in.d; ++i) x_.data()[r * in.d + i] = q[i] * in.scale;
    }
    product_.set_rows(x_.data(), rows_);
    std::fill_n(sums_.data(), rows_ * in.d_value, 0.0f);
  }

  void run() {
    const int64_t last = in_.causal ? std::min(in_.keys, visible(rows_ - 1)) : in_.keys;
    for (int64_t first = 0; first < last; first += kKeyBlock) {
      const int64_t width = std::min(kKeyBlock, last - first);
      product_.forward(first, width, logits_.data());
      for (int64_t r = 0; r < rows_; ++r) {
        float* z = logits_.data() + r * kKeyBlock;
        if (in_.mask) kernels().transform(z, in_.mask + (first_ + r % count_) * in_.keys + first, width, 1, 0);
        if (in_.causal) std::fill(z + std::clamp<int64_t>(visible(r) - first, 0, width), z + width, -std::numeric_limits<float>::infinity());
        const float shrink = kernels().softmax_add(z, first, width, softmax_[r], z);
        if (shrink != 1) scale(r, shrink);
      }
      product_.backward(logits_.data(), rows_, first, width, sums_.data());
    }
  }

  void write(float* out) {
    for (int64_t r = 0; r < rows_; ++r) {
      scale(r, float(1 / softmax_[r].sum));
      std::copy_n(sums_.data() + r * in_.d_value, in_.d_value, out + query(r) * in_.d_value);
    }
  }

 private:
  // The index of row r among all queries of all heads.
  int64_t query(int64_t r) const {
    return (head_ + r / count_) * in_.queries + first_ + r % count_;
  }

  // The number of keys that row r sees; the last query sees all.
  int64_t visible(int64_t r) const {
    return first_ + r % count_ + in_.keys - in_.queries + 1;
  }

  void scale(int64_t r, float factor) {
    for (int64_t i = 0; i < in_.d_value; ++i) sums_.data()[r * in_.d_value + i] *= factor;
  }

  const AttentionInput& in_;
  int64_t group_, head_, first_, count_, rows_;
  Matrix keys_, values_;
  BlockProduct product_;
  Buffer<float> x_, logits_, sums_;
  std::vector<SoftmaxSums> softmax_;
};

}  // namespace

void attention(const AttentionInput& in, Precision precision, float* out) {
  const int64_t blocks = (in.queries + kQueries - 1) / kQueries;
  parallel_for(in.batch * in.kv_heads * blocks, [&](int64_t i) {
    // The last queries see the most keys. They go first, so that no thread is left alone with them at the end.
    const int64_t first = (blocks - 1 - i % blocks) * kQueries, head = i / blocks;
    Task task(in, precision, head / in.kv_heads, head % in.kv_heads, first, std::min(kQueries, in.queries - first));
    task.run();
    task.write(out);
  });
}

}  // namespace metalens::cpu
