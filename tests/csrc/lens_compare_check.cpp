// Compares lens_compare with sums in double precision.
#include "check_head.h"
#include "cpu/lens_compare.h"
#include "cpu/lens_target.h"

using namespace check;

namespace {

// The divergences of two rows in double precision.
struct Expected {
  double kl, reverse_kl, js = 0, tv = 0;

  Expected(const Softmax& a, const Softmax& b) : kl(divergence(a, b)), reverse_kl(divergence(b, a)) {
    for (size_t v = 0; v < a.z.size(); ++v) {
      const double p = a.p[v], q = b.p[v], u = std::abs(p - q) / std::max(p + q, 1e-300);
      const double entropy = u < 1e-3 ? u * u * (0.5 + u * u / 12) : ((1 + u) * std::log1p(u) + (u < 1 ? (1 - u) * std::log1p(-u) : 0)) / 2;
      js += (p + q) * entropy / 2;
      tv += std::abs(p - q) / 2;
    }
  }
};

std::vector<float> lse_of(const Head& head, const std::vector<float>& rows, Precision precision) {
  const int64_t count = int64_t(rows.size()) / head.u.cols;
  std::vector<float> lse(count), entropy(count);
  lens_target(head, rows.data(), count, precision, {lse.data(), entropy.data(), nullptr});
  return lse;
}

// `other`: b goes through a head of its own. `one`: b has one layer. `broken`: a row of a that is NaN.
void check_compare(const HeadCase& c, bool other, bool one, Precision precision, int64_t broken = -1) {
  begin(
      "lens_compare layers %ld tokens %ld D %ld vocab %ld bits %d softcap %g distance %g other %d one %d broken %ld precision %d", long(c.layers),
      long(c.tokens), long(c.d), long(c.vocab), c.storage.bits, c.softcap, c.distance, int(other), int(one), long(broken), int(precision));
  HeadCase c_b = c;
  c_b.d = 48;
  c_b.storage = kNvfp4;
  const TestHead test_a(c), test_b(other ? c_b : c);
  const TestHead& of_b = other ? test_b : test_a;
  const Head head_a = test_a.head(), head_b = of_b.head();
  const int64_t layers_b = one ? 1 : c.layers;
  std::vector<float> a = test_a.rows(c.layers * c.tokens), b = of_b.rows(layers_b * c.tokens);
  for (size_t i = 0; !other && i < b.size(); ++i) b[i] = a[i] + c.distance * b[i];
  if (broken >= 0) a[broken * c.d] = kNaN;
  const auto lse_a = lse_of(head_a, a, precision), lse_b = lse_of(head_b, b, precision);
  const int64_t rows = c.layers * c.tokens;
  std::vector<float> kl(rows), reverse_kl(rows), js(rows), tv(rows);
  const LensCompareInput in{c.tokens, {c.layers, a.data(), lse_a.data()}, {layers_b, b.data(), lse_b.data()}};
  lens_compare(head_a, other ? head_b : head_a, in, precision, {kl.data(), reverse_kl.data(), js.data(), tv.data()});

  for (int64_t r = 0; r < rows; ++r) {
    if (r == broken) {
      for (const auto* found : {&kl, &reverse_kl, &js, &tv}) near("of a NaN row", r, (*found)[r], kNaN, 0);
      continue;
    }
    const Softmax of_a(test_a, a.data() + r * c.d), of_row(of_b, b.data() + (one ? r % c.tokens : r) * head_b.u.cols);
    const Expected expected(of_a, of_row);
    const double error = unit(precision) * (of_a.size + of_row.size) + 1e-6 * (1 + std::abs(of_a.lse));
    near("kl", r, kl[r], expected.kl, 4 * error * (error + std::sqrt(expected.kl) + expected.kl));
    near("reverse kl", r, reverse_kl[r], expected.reverse_kl, 4 * error * (error + std::sqrt(expected.reverse_kl) + expected.reverse_kl));
    near("js", r, js[r], expected.js, 4 * error * (error + std::sqrt(expected.js)));
    near("tv", r, tv[r], expected.tv, 2 * error + 1e-6);
  }
}

}  // namespace

int main() {
  for (Precision precision : precisions()) {
    for (int64_t vocab : {1, 255, 257, 700}) {
      for (float distance : {0.0f, 0.001f, 0.3f, 3.0f}) check_compare({2, 3, 64, vocab, 0, kFourBits, true, 1, 0, distance}, false, false, precision);
      check_compare({2, 3, 64, vocab, 5, kFourBits, false, 1, 0, 1}, true, false, precision);
    }
    // Row counts too small for packing, and more than one block of rows; one layer of b for all of a; all options of a head.
    for (const auto& [layers, tokens] : {std::pair<int64_t, int64_t>{1, 1}, {1, 4}, {5, 3}, {90, 4}}) {
      check_compare({layers, tokens, 32, 300, 13, kFourBits, true, 0.25f, 0, 1, true}, false, true, precision);
      check_compare({layers, tokens, 32, 300, 0, kFourBits, false, 1, 5, 0.2f, true}, layers == 5, false, precision);
    }
    check_compare({3, 2, 32, 300, 0, kFourBits, true, 1, 0, 1}, false, false, precision, 4);
    check_compare({0, 3, 32, 30, 0, kFourBits, true, 1, 0, 1}, false, false, precision);
  }
  return result();
}
