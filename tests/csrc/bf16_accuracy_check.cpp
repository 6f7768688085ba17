// Compares lens_kl with 16-bit operands with double precision on the exact, unrounded U: the accuracy that precision 'bf16' promises. Linked with one
// unit of 16-bit kernels in place of the choice at run time. Prints the measured errors; exits 1 if one is beyond its bound. The KL's median error
// comes from a mean over the vocabulary of roundings of U: it was 0.8e-3 to 1.5e-3 here, and 4e-4 to 7e-4 at D = 512, V = 12000.
#include <algorithm>
#include <cstdio>

#include "check_head.h"
#include "cpu/lens_kl.h"
#include "cpu/lens_target.h"

namespace metalens::cpu {

namespace METALENS_CHECKED_ISA {
extern const KernelTable table;
}

const KernelTable& kernels() {
  return METALENS_CHECKED_ISA::table;
}

}  // namespace metalens::cpu

using namespace check;

namespace {

struct Errors {
  double kl_median, kl_worst, gradient, gradient_worst;
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}

Errors measure(const HeadCase& c) {
  const TestHead head(c);
  const auto model = head.rows(c.tokens), n = head.around(model);
  std::vector<float> lse(c.tokens), entropy(c.tokens), mean(c.tokens * c.d), kl(c.layers * c.tokens), dn(n.size());
  lens_target(head.head(), model.data(), c.tokens, Precision::bf16, {lse.data(), entropy.data(), c.softcap ? nullptr : mean.data()});
  const LensKLInput in{c.layers, c.tokens, n.data(), model.data(), lse.data(), c.softcap ? nullptr : mean.data()};
  lens_kl(head.head(), in, Precision::bf16, kl.data(), dn.data());

  std::vector<double> relative;
  Errors e{0, 0, 0, 0};
  double squares = 0, error_squares = 0;
  for (int64_t r = 0; r < c.layers * c.tokens; ++r) {
    const Softmax p(head, model.data() + r % c.tokens * c.d), q(head, n.data() + r * c.d);
    double exact = 0, row = 0, row_error = 0;
    for (int64_t v = 0; v < c.vocab; ++v) exact += p.p[v] * ((p.z[v] - p.lse) - (q.z[v] - q.lse));
    relative.push_back(std::abs(kl[r] - exact) / exact);
    e.kl_worst = std::max(e.kl_worst, std::abs(kl[r] - exact));
    for (int64_t i = 0; i < c.d; ++i) {
      double gradient = 0;
      for (int64_t v = 0; v < c.vocab; ++v) gradient += c.scale * (q.p[v] - p.p[v]) * q.slope[v] * head.u().at(v, i);
      row += gradient * gradient;
      row_error += (dn[r * c.d + i] - gradient) * (dn[r * c.d + i] - gradient);
    }
    e.gradient_worst = std::max(e.gradient_worst, std::sqrt(row_error / row));
    squares += row;
    error_squares += row_error;
  }
  e.kl_median = median(relative);
  e.gradient = std::sqrt(error_squares / squares);
  return e;
}

}  // namespace

int main() {
  bool right = true;
  for (float softcap : {0.0f, 20.0f}) {
    for (float distance : {1.0f, 0.1f, 0.01f, 1e-3f}) {
      const Errors e = measure(
          {.layers = 5,
           .tokens = 6,
           .d = 128,
           .vocab = 1100,
           .padding = 0,
           .storage = kFourBits,
           .bias = false,
           .scale = 1,
           .softcap = softcap,
           .distance = distance});
      std::printf(
          "softcap %4.0f distance %.0e: KL median %.1e of itself, worst %.1e nats; gradient %.1e, worst row %.1e\n", softcap, distance, e.kl_median,
          e.kl_worst, e.gradient, e.gradient_worst);
      right = right && e.kl_median < 2e-3 && e.kl_worst < 1.5e-2 && e.gradient < 5e-3 && e.gradient_worst < 2e-2;
    }
  }
  return right ? 0 : 1;
}
