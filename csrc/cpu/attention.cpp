#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/block_product.h"
#include "cpu/softmax.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

constexpr int64_t kQueries = 64;  // queries of a task, from each head that shares its keys
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The rows [first, first + n) as a matrix: in place, or copied as floats into `scratch`.
Matrix matrix_of(const StridedRows& rows, int64_t first, int64_t n, Buffer<float>& scratch) {
  const void* values = rows.block(first, n);
  Element element = rows.element();
  if (!values) {
    scratch = Buffer<float>(n * rows.width());
    for (int64_t i = 0; i < n; ++i) rows.copy(first + i, 0, rows.width(), scratch.data() + i * rows.width());
    values = scratch.data();
    element = Element::f32;
  }
  return {n, rows.width(), element, Format::dense, 0, 0, values, nullptr, nullptr};
}

// Queries [first, first + count) of all the heads that share one head of keys.
class Task {
 public:
  Task(const AttentionInput& in, Precision precision, int64_t batch, int64_t kv_head, int64_t first, int64_t count)
      : in_(in),
        group_(in.heads / in.kv_heads),
        batch_(batch),
        head_(kv_head * group_),
        first_(first),
        count_(count),
        rows_(group_ * count),
        last_(in.causal ? std::min(in.keys, visible(count - 1)) : in.keys),
        keys_(matrix_of(in.k, (batch * in.kv_heads + kv_head) * in.keys, last_, copied_keys_)),
        values_(matrix_of(in.v, (batch * in.kv_heads + kv_head) * in.keys, last_, copied_values_)),
        product_(keys_, values_, precision),
        x_(rows_ * in.q.width()),
        logits_(rows_ * kKeyBlock),
        sums_(rows_ * in.v.width()),
        softmax_(rows_, kEmptySoftmax) {
    const int64_t d = in.q.width();
    for (int64_t r = 0; r < rows_; ++r) {
      float* x = x_.data() + r * d;
      in.q.copy((batch_ * in.heads + head(r)) * in.queries + query(r), 0, d, x);
      for (int64_t i = 0; i < d; ++i) x[i] *= in.scale;
      // exp(sink - top) is in the sum from the start.
      if (in.sinks && in.sinks[head(r)] > -kInfinity) softmax_[r] = {in.sinks[head(r)], -1, 1, 0};
    }
    product_.set_rows(x_.data(), rows_);
    std::fill_n(sums_.data(), rows_ * in.v.width(), 0.0f);
  }

  void run() {
    for (int64_t first = 0; first < last_; first += kKeyBlock) {
      const int64_t width = std::min(kKeyBlock, last_ - first);
      if (hidden(first, width)) continue;
      product_.forward(first, width, logits_.data());
      for (int64_t r = 0; r < rows_; ++r) {
        float* z = logits_.data() + r * kKeyBlock;
        mask(z, r, first, width);
        if (in_.causal) std::fill(z + std::clamp<int64_t>(visible(query(r) - first_) - first, 0, width), z + width, -kInfinity);
        const float shrink = kernels().softmax_add(z, first, width, softmax_[r], z);
        if (shrink != 1) scale(r, shrink);
      }
      product_.backward(logits_.data(), rows_, first, width, sums_.data());
    }
  }

  void write(const Output& out) {
    const int64_t e = in_.v.width();
    for (int64_t r = 0; r < rows_; ++r) {
      scale(r, float(1 / softmax_[r].sum));
      const int64_t offset = ((batch_ * in_.queries + query(r)) * in_.heads + head(r)) * e;
      float* sums = sums_.data() + r * e;
      std::copy_n(sums, e, out.at(offset, sums));
      out.finish(offset, e, sums);
    }
  }

 private:
  int64_t head(int64_t r) const {
    return head_ + r / count_;
  }
  int64_t query(int64_t r) const {
    return first_ + r % count_;
  }
  // The number of keys that the task's i-th query sees; the last query of all sees all.
  int64_t visible(int64_t i) const {
    return first_ + i + in_.keys - in_.queries + 1;
  }

  int64_t mask_offset(int64_t r, int64_t key) const {
    const auto& strides = in_.mask.strides;
    return batch_ * strides[0] + head(r) * strides[1] + query(r) * strides[2] + key * strides[3];
  }

  // Whether a mask of booleans hides all of these keys from all rows: most blocks of a sliding window.
  bool hidden(int64_t first, int64_t width) const {
    const AttentionMask& m = in_.mask;
    if (!m.data || !m.booleans || m.strides[3] != 1) return false;
    const int64_t rows = m.strides[1] == 0 ? count_ : rows_;
    for (int64_t r = 0; r < rows; ++r) {
      if (std::memchr(static_cast<const uint8_t*>(m.data) + mask_offset(r, first), 1, width)) return false;
    }
    return true;
  }

  void mask(float* z, int64_t r, int64_t first, int64_t width) const {
    const AttentionMask& m = in_.mask;
    if (!m.data) return;
    const int64_t step = m.strides[3], start = mask_offset(r, first);
    if (m.booleans) {
      const uint8_t* visible = static_cast<const uint8_t*>(m.data) + start;
      if (step == 1 && !std::memchr(visible, 0, width)) return;
      for (int64_t j = 0; j < width; ++j) z[j] = visible[j * step] ? z[j] : -kInfinity;
      return;
    }
    const int64_t size = element_size(m.element);
    const char* numbers = static_cast<const char*>(m.data) + start * size;
    float added[kKeyBlock];
    if (step == 1) {
      kernels().load(m.element, numbers, added, width);
    } else {
      for (int64_t j = 0; j < width; ++j) kernels().load(m.element, numbers + j * step * size, added + j, 1);
    }
    kernels().add(z, added, width, z);
  }

  void scale(int64_t r, float factor) {
    const int64_t e = in_.v.width();
    for (int64_t i = 0; i < e; ++i) sums_.data()[r * e + i] *= factor;
  }

  const AttentionInput& in_;
  int64_t group_, batch_, head_, first_, count_, rows_, last_;
  Buffer<float> copied_keys_, copied_values_;
  Matrix keys_, values_;
  BlockProduct product_;
  Buffer<float> x_, logits_, sums_;
  std::vector<SoftmaxSums> softmax_;
};

}  // namespace

void attention(const AttentionInput& in, Precision precision, const Output& out) {
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
