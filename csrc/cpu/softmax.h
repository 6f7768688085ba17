// What SoftmaxSums mean, and how the sums of two parts of a row are merged.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "cpu/kernels.h"

namespace metalens::cpu {

constexpr SoftmaxSums kEmptySoftmax{-std::numeric_limits<float>::infinity(), -1, 0, 0};

inline double log_sum(const SoftmaxSums& s) {
  return s.top + std::log(s.sum);
}

// The entropy of the distribution, in nats.
inline double entropy(const SoftmaxSums& s) {
  return std::log(s.sum) - s.moment / s.sum;
}

// The factors by which the weights of two parts shrink when both are taken relative to the larger top.
inline std::pair<double, double> rescaling(const SoftmaxSums& a, const SoftmaxSums& b) {
  if (a.top == b.top) return {1, 1};
  return a.top > b.top ? std::pair(1.0, std::exp(double(b.top) - a.top)) : std::pair(std::exp(double(a.top) - b.top), 1.0);
}

// The sums of both parts; `b` holds later ids than `a`.
inline SoftmaxSums merged(const SoftmaxSums& a, const SoftmaxSums& b) {
  const auto [of_a, of_b] = rescaling(a, b);
  const SoftmaxSums& larger = b.top > a.top ? b : a;
  const auto moved = [&](const SoftmaxSums& s, double factor) {
    return factor == 0 || s.sum == 0 ? 0.0 : factor * (s.moment + (double(s.top) - larger.top) * s.sum);
  };
  return {larger.top, larger.best, of_a * a.sum + of_b * b.sum, moved(a, of_a) + moved(b, of_b)};
}

}  // namespace metalens::cpu
