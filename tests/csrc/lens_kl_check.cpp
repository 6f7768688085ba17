// Compares lens_target and lens_kl with a softmax and its gradient in double precision.
#include "check_head.h"
#include "cpu/lens_kl.h"
#include "cpu/lens_target.h"

using namespace check;

namespace {

// The error of an output apart from that of the products: the rounding of lse and of the probabilities.
constexpr double kRounding = 2e-6;

void check_target(const TestHead& test, const HeadCase& c, const std::vector<float>& model, const LensTargetOutput& out, Precision precision) {
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (!std::isfinite(model[t * c.d])) {
      if (std::isnan(model[t * c.d])) near("lse of a NaN row", t, out.lse[t], kNaN, 0);
      if (std::isnan(model[t * c.d])) near("entropy of a NaN row", t, out.entropy[t], kNaN, 0);
      continue;
    }
    const Softmax row(test, model.data() + t * c.d);
    const double error = unit(precision) * row.size + kRounding * (1 + std::abs(row.lse));
    near("lse", t, out.lse[t], row.lse, error);
    near("entropy", t, out.entropy[t], row.entropy, error * (2 + std::log(double(c.vocab))));
    for (int64_t i = 0; out.mean && i < c.d; ++i) {
      double mean = 0, size = 0;
      for (int64_t v = 0; v < c.vocab; ++v) {
        mean += row.p[v] * test.u().at(v, i);
        size += row.p[v] * test.u().size_at(v, i);
      }
      near("mean", t * c.d + i, out.mean[t * c.d + i], mean, size * (unit(precision) + 2 * error));
    }
  }
}

void check_kl(const HeadCase& c, Precision precision, int64_t broken = -1, float broken_value = kNaN, float model_size = 1) {
  begin(
      "lens_kl layers %ld tokens %ld D %ld vocab %ld + %ld bits %d bias %d scale %g softcap %g distance %g offset %d broken %ld by %g size %g "
      "precision %d",
      long(c.layers), long(c.tokens), long(c.d), long(c.vocab), long(c.padding), c.storage.bits, int(c.bias), c.scale, c.softcap, c.distance,
      int(c.offset), long(broken), broken_value, model_size, int(precision));
  const TestHead test(c);
  const Head head = test.head();
  std::vector<float> model = test.rows(c.tokens, model_size), n = test.around(model);
  if (broken >= 0) n[broken * c.d] = broken_value;
  if (broken == -2) model[0] = broken_value;
  const int64_t rows = c.layers * c.tokens;
  const bool linear = c.softcap == 0;
  std::vector<float> lse(c.tokens), entropy(c.tokens), mean(linear ? c.tokens * c.d : 0), kl(rows, 7), loss(rows, 7), dn(rows * c.d, 7);
  const LensTargetOutput target{lse.data(), entropy.data(), linear ? mean.data() : nullptr};
  lens_target(head, model.data(), c.tokens, precision, target);
  check_target(test, c, model, target, precision);
  const LensKLInput in{c.layers, c.tokens, n.data(), model.data(), lse.data(), target.mean};
  lens_kl(head, in, precision, kl.data(), dn.data());
  lens_kl(head, in, precision, loss.data(), nullptr);

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = r % c.tokens;
    if (r == broken || (broken == -2 && t == 0)) {
      if (!std::isnan(broken_value)) continue;  // infinite rows need only leave the others alone
      near("kl of a NaN row", r, kl[r], kNaN, 0);
      near("loss of a NaN row", r, loss[r], kNaN, 0);
      for (int64_t i = 0; i < c.d; ++i) near("dn of a NaN row", r * c.d + i, dn[r * c.d + i], kNaN, 0);
      continue;
    }
    if (model_size > 1) {
      expect(std::isfinite(kl[r]) && kl[r] >= 0, "kl of a saturated row", r, kl[r], 0, 0);
      for (int64_t i = 0; i < c.d; ++i) expect(std::isfinite(dn[r * c.d + i]), "dn of a saturated row", r * c.d + i, dn[r * c.d + i], 0, 0);
      continue;
    }
    const Softmax target_row(test, model.data() + t * c.d), lens(test, n.data() + r * c.d);
    const double wanted = divergence(target_row, lens);
    // Errors of d are relative to d; an error in the model's probabilities shifts the weights of the sum.
    const double relative =
        10 * unit(precision) + unit(precision) * target_row.size + kRounding * (1 + std::abs(lens.lse) + std::abs(target_row.lse));
    // The terms of the sum are small only if d is taken relative to its mean, which a first pass with a softcap does not know.
    double terms = wanted;
    for (int64_t v = 0; v < c.vocab && !linear; ++v) {
      const double d = std::abs(lens.z[v] - target_row.z[v]);
      terms += target_row.p[v] * std::min(d, d * d);
    }
    // If all d are equal, only errors of the products remain: they are relative to the terms of d and of the model's logits.
    double largest = 0;
    for (int64_t v = 0; v < c.vocab; ++v) {
      double sum = 0;
      for (int64_t i = 0; i < c.d; ++i) sum += std::abs(n[r * c.d + i] - model[t * c.d + i]) * test.u().size_at(v, i);
      largest = std::max(largest, c.scale * sum);
    }
    const double of_d = unit(precision) * largest, of_model = unit(precision) * target_row.size;
    near("kl", r, kl[r], wanted, relative * terms + of_d * (of_d + of_model) + 1e-14);
    near("loss", r, loss[r], wanted, relative * terms + of_d * (of_d + of_model) + 1e-14);
    // With a softcap the gradient needs the softmax's sum from a pass relative to the model's, where it may be 1e-3 beside rounded terms of 1.
    const double sum_of_first_pass = std::exp(lens.lse - target_row.lse);
    const double of_sum = linear ? 0 : 1e-6 / std::clamp(sum_of_first_pass, 1e-3, 1.0) + of_model * std::min(1.0, std::abs(sum_of_first_pass - 1));
    for (int64_t i = 0; i < c.d; ++i) {
      double gradient = 0, size = 0, rounding = 0;
      for (int64_t v = 0; v < c.vocab; ++v) {
        const double change = target_row.p[v] * std::expm1((lens.z[v] - lens.lse) - (target_row.z[v] - target_row.lse));
        gradient += c.scale * change * lens.slope[v] * test.u().at(v, i);
        size += c.scale * std::abs(change) * test.u().size_at(v, i);
        rounding += c.scale * target_row.p[v] * test.u().size_at(v, i) * (of_sum + 1e-6 * std::abs(lens.z[v] - target_row.z[v]));
        rounding += c.scale * lens.p[v] * test.u().size_at(v, i) * of_d;
      }
      near("dn", r * c.d + i, dn[r * c.d + i], gradient, relative * size + rounding + 1e-14);
    }
  }
}

}  // namespace

int main() {
  for (Precision precision : precisions()) {
    // From nearly equal, with a KL of about 1e-8, to so far away that the first pass overflows; without a softcap, with one, and with a strong one.
    for (float distance : {0.0f, 1e-4f, 0.1f, 3.0f, 40.0f, 400.0f}) {
      for (float softcap : {0.0f, 3.0f, 30.0f, 500.0f}) {
        check_kl({2, 3, 32, 257, 3, kFourBits, true, 0.5f, softcap, distance}, precision);
        // The gradient of a single id is 0, so its value is all error; the error is small in float32.
        if (precision == Precision::float32) check_kl({2, 3, 32, 1, 3, kFourBits, true, 0.5f, softcap, distance}, precision);
        check_kl({1, 1, 32, 300, 0, kFourBits, false, 1, softcap, distance}, precision);
        // An offset of the logits, with and without a bias.
        check_kl({2, 3, 32, 257, 3, kFourBits, true, 0.5f, softcap, distance, true}, precision);
        check_kl({1, 2, 17, 300, 0, kDense, false, 1, softcap, distance, true}, precision);
        check_kl({1, 2, 96, 65, 0, {Format::affine, 8, 32, Element::f16}, true, 1, softcap, distance}, precision);
        check_kl({5, 1, 17, 255, 0, kDense, false, 2, softcap, distance}, precision);
      }
    }
    for (float softcap : {0.0f, 30.0f}) check_kl({2, 3, 64, 700, 3, kFourBits, true, 0.5f, softcap, 10}, precision);
    // More rows than a block, from many tokens and from many layers.
    for (float softcap : {0.0f, 30.0f}) {
      check_kl({3, 100, 16, 257, 0, kNvfp4, false, 1, softcap, 1}, precision);
      check_kl({260, 2, 16, 65, 0, kNvfp4, false, 1, softcap, 1}, precision);
      // A row that is not finite changes no other row, whether or not others need several passes.
      for (float value : {kNaN, kInfinity}) {
        for (int64_t broken : {0, 4, -2}) {
          check_kl({3, 2, 32, 300, 0, kFourBits, true, 1, softcap, 1}, precision, broken, value);
          check_kl({3, 2, 32, 300, 0, kFourBits, true, 1, softcap, 400}, precision, broken, value);
        }
      }
      check_kl({0, 3, 32, 30, 0, kFourBits, true, 1, softcap, 1}, precision);
    }
    // A model whose logits equal the softcap to the last bit, and a lens with the opposite sign: hardly any digits are left to compare.
    for (float size : {3.0f, 10.0f, 40.0f}) check_kl({2, 3, 32, 300, 0, kFourBits, false, 1, 5, size}, precision, -1, kNaN, size);
  }
  return result();
}
