// A head and rows for it, with logits in double precision, for lens_stats_check and lens_kl_check to compare with.
#pragma once

#include "check.h"
#include "cpu/head.h"

namespace check {

struct HeadCase {
  int64_t layers, tokens, d, vocab;
  int64_t padding;  // rows of U beyond the vocabulary
  Storage storage;
  bool bias;
  float scale, softcap;
  float distance;       // distance of the lens's rows from the model's, relative to the model's
  bool offset = false;  // of the logits, after the softcap
};

inline const Storage kFourBits{Format::affine, 4, 32, Element::f32};
inline const Storage kNvfp4{Format::nvfp4, 4, 16, Element::f32};

class TestHead {
 public:
  explicit TestHead(const HeadCase& c)
      : c_(c),
        u_(c.vocab + c.padding, c.d, c.storage),
        bias_(c.bias ? normals(c.vocab, 1) : std::vector<float>()),
        offset_(c.offset ? normals(c.vocab, 3) : std::vector<float>()) {
    unit_row_ = float(2 / (c.scale * u_.rms() * std::sqrt(double(c.d))));
  }

  Head head() const {
    return {u_.matrix(), c_.bias ? bias_.data() : nullptr, c_.scale, c_.softcap, c_.vocab, c_.offset ? offset_.data() : nullptr};
  }

  // Rows whose logits have a standard deviation of about 2 * `size`.
  std::vector<float> rows(int64_t count, float size = 1) const {
    return normals(count * c_.d, size * unit_row_);
  }

  // Rows [layers, tokens, D] around the model's.
  std::vector<float> around(const std::vector<float>& model) const {
    std::vector<float> n = rows(c_.layers * c_.tokens, c_.distance);
    for (size_t i = 0; i < n.size(); ++i) n[i] += model[i % model.size()];
    return n;
  }

  const Frozen& u() const {
    return u_;
  }

 private:
  HeadCase c_;
  Frozen u_;
  std::vector<float> bias_, offset_;
  float unit_row_;

  friend struct Softmax;
};

// A row of logits in double precision.
struct Softmax {
  std::vector<double> z, p, slope;  // slope of the softcap
  double lse = 0, entropy = 0;
  double size = 0;  // magnitude of the terms of the largest logit, which errors are relative to

  Softmax(const TestHead& head, const float* n) {
    const HeadCase& c = head.c_;
    double top = -INFINITY;
    for (int64_t v = 0; v < c.vocab; ++v) {
      double sum = c.bias ? head.bias_[v] : 0, terms = std::abs(sum);
      for (int64_t i = 0; i < c.d; ++i) {
        sum += n[i] * head.u_.at(v, i);
        terms += std::abs(n[i]) * head.u_.size_at(v, i);
      }
      const double raw = c.scale * sum, bent = c.softcap ? std::tanh(raw / c.softcap) : 0;
      const double offset = c.offset ? head.offset_[v] : 0;
      z.push_back((c.softcap ? c.softcap * bent : raw) + offset);
      slope.push_back(1 - bent * bent);
      top = std::max(top, z.back());
      size = std::max(size, c.scale * terms + std::abs(offset));
    }
    double sum = 0;
    for (double v : z) sum += std::exp(v - top);
    lse = top + std::log(sum);
    for (double v : z) {
      p.push_back(std::exp(v - lse));
      entropy -= p.back() * (v - lse);
    }
  }

  int64_t best() const {
    return std::max_element(z.begin(), z.end()) - z.begin();
  }
};

// KL(model || lens), computed without cancellation if the two are nearly equal.
inline double divergence(const Softmax& model, const Softmax& lens) {
  double kl = 0;
  for (size_t v = 0; v < model.z.size(); ++v) {
    const double t = (lens.z[v] - lens.lse) - (model.z[v] - model.lse);
    kl += model.p[v] * (std::abs(t) < 1e-3 ? t * t * (0.5 + t * (1.0 / 6 + t / 24)) : std::expm1(t) - t);
  }
  return kl;
}

}  // namespace check
