// Compares translate_norm and norm_backward with double precision, and the gradient with finite differences of the norm.
#include "check.h"
#include "cpu/translate_norm.h"

using namespace check;

namespace {

// n = norm(y) for one row.
std::vector<double> normalized(const std::vector<double>& y, const Norm& norm) {
  if (!norm.enabled) return y;
  const double d = double(y.size());
  double mean = 0, squares = 0;
  for (double v : y) mean += norm.center ? v / d : 0;
  for (double v : y) squares += (v - mean) * (v - mean) / d;
  std::vector<double> n(y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    n[i] = (y[i] - mean) / std::sqrt(squares + norm.eps) * (norm.gain ? norm.gain[i] : 1) + (norm.bias ? norm.bias[i] : 0);
  }
  return n;
}

void check_backward(const std::vector<float>& y, const std::vector<float>& dn, int64_t rows, int64_t d, const Norm& norm) {
  std::vector<float> dy(rows * d, kNaN);
  norm_backward(y.data(), dn.data(), rows, d, norm, dy.data());
  for (int64_t r = 0; r < rows; ++r) {
    if (std::isnan(y[r * d])) continue;
    std::vector<double> at(y.begin() + r * d, y.begin() + (r + 1) * d);
    double size = 0;
    std::vector<double> gradient(d);
    for (int64_t i = 0; i < d; ++i) {
      const double step = 1e-5, middle = at[i];
      at[i] = middle + step;
      const auto above = normalized(at, norm);
      at[i] = middle - step;
      const auto below = normalized(at, norm);
      at[i] = middle;
      for (int64_t j = 0; j < d; ++j) gradient[i] += dn[r * d + j] * (above[j] - below[j]) / (2 * step);
      size = std::max(size, std::abs(gradient[i]));
    }
    // With a single element all but eps cancels.
    for (int64_t i = 0; i < d; ++i) near("dy", r * d + i, dy[r * d + i], gradient[i], 2e-5 * (size + std::abs(dn[r * d + i])));
  }
}

void check_norm(
    int64_t rows, int64_t d, bool with_b, bool with_gain, bool with_bias, bool enabled, bool center, int64_t broken, Precision precision) {
  begin(
      "translate_norm rows %ld D %ld b %d gain %d bias %d enabled %d center %d broken %ld precision %d", long(rows), long(d), int(with_b),
      int(with_gain), int(with_bias), int(enabled), int(center), long(broken), int(precision));
  const Frozen w(d, d, kDense);
  const std::vector<float> b = normals(with_b ? d : 0, 1), gain = normals(with_gain ? d : 0, 1), bias = normals(with_bias ? d : 0, 1);
  std::vector<float> h = normals(rows * d, 1), y(rows * d, kNaN), n(rows * d, kNaN);
  if (broken >= 0) h[broken * d + d / 2] = kNaN;
  const Norm norm{enabled, center, 1e-3f, with_gain ? gain.data() : nullptr, with_bias ? bias.data() : nullptr};
  const Matrix matrix = w.matrix();
  translate_norm(h.data(), rows, d, &matrix, with_b ? b.data() : nullptr, norm, precision, y.data(), n.data());
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> exact(d);
    for (int64_t j = 0; j < d; ++j) {
      double sum = with_b ? b[j] : 0, size = std::abs(sum);
      for (int64_t i = 0; i < d; ++i) {
        sum += h[r * d + i] * w.at(j, i);
        size += std::abs(h[r * d + i]) * w.size_at(j, i);
      }
      near("y", r * d + j, y[r * d + j], sum, unit(precision) * size);
      exact[j] = y[r * d + j];
    }
    const auto wanted = normalized(exact, norm);
    for (int64_t j = 0; j < d; ++j) near("n", r * d + j, n[r * d + j], wanted[j], 4e-6 * (1 + std::abs(wanted[j])));
  }
  check_backward(y, normals(rows * d, 1), rows, d, norm);
}

}  // namespace

int main() {
  for (Precision precision : precisions()) {
    for (int64_t d : {1, 7, 16, 33, 96}) {
      for (int64_t rows : {1, 5, 9}) {
        for (bool center : {false, true}) {
          check_norm(rows, d, false, false, false, true, center, -1, precision);
          check_norm(rows, d, true, true, true, true, center, -1, precision);
        }
        check_norm(rows, d, true, true, false, true, false, rows / 2, precision);
        check_norm(rows, d, true, false, false, false, false, -1, precision);
      }
    }
    // Rows in several runs.
    check_norm(700, 96, true, true, true, true, true, 3, precision);
  }
  return result();
}
