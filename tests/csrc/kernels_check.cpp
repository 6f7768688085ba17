// Checks the small functions of a kernel table over dense sweeps of their arguments: 16-bit floats and codes of quantized formats bit by bit, the
// exponential and the hyperbolic tangent to their stated accuracy, and the sums of a softmax.
#include "check.h"

using namespace check;

namespace {

constexpr double kSmallest = 1.5e-45;  // the smallest subnormal number, the resolution of results near 0

float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Floats of either sign up to `most` in magnitude, including subnormal ones, with about the same count for each exponent.
std::vector<float> sweep(float most) {
  std::vector<float> all{0.0f, -0.0f, most, -most};
  for (uint32_t bits = 1; from_bits(bits) < most; bits += 20011) {
    all.push_back(from_bits(bits));
    all.push_back(-from_bits(bits));
  }
  return all;
}

// One unit in the last place of a float near x >= 0.
double ulp(double x) {
  return x > 0 ? std::max(std::ldexp(1, std::ilogb(x) - 23), kSmallest) : kSmallest;
}

void check_elements() {
  std::vector<uint16_t> codes(65536), back(65536);
  for (int i = 0; i < 65536; ++i) codes[i] = uint16_t(i);
  std::vector<float> wide(65536);
  for (Element element : {Element::f16, Element::bf16}) {
    begin("element %d", int(element));
    const int mantissa_bits = element == Element::f16 ? 10 : 7, bias = element == Element::f16 ? 15 : 127;
    kernels().load(element, codes.data(), wide.data(), 65536);
    kernels().store(element, wide.data(), back.data(), 65536);
    for (int i = 0; i < 65536; ++i) {
      const int exponent = (i & 0x7fff) >> mantissa_bits, mantissa = i & ((1 << mantissa_bits) - 1);
      double value = std::ldexp(mantissa + (exponent ? 1 << mantissa_bits : 0), std::max(exponent, 1) - bias - mantissa_bits);
      if (exponent == 2 * bias + 1) value = mantissa ? kNaN : kInfinity;
      equal("widened", i, wide[i], i & 0x8000 ? -value : value);
      if (!std::isnan(value)) equal("narrowed", i, back[i], i);
    }
    // A value halfway between two neighbors goes to the even one, any other value to the nearer one.
    for (int i = 0; i < 0x7000; i += 3) {
      const float low = wide[i], high = wide[i + 1], middle = low + (high - low) / 2;
      const float three[3] = {std::nextafter(middle, low), middle, std::nextafter(middle, high)};
      uint16_t narrow[3];
      kernels().store(element, three, narrow, 3);
      // The middle of two subnormal bf16 has no neighbors between them and itself that would round elsewhere.
      equal("below the middle", i, narrow[0], i);
      equal("the middle", i, narrow[1], i + i % 2);
      equal("above the middle", i, narrow[2], i + 1);
    }
  }
  begin("NaN as bf16");
  const float nan = from_bits(0x7f800001);
  uint16_t narrow;
  kernels().store(Element::bf16, &nan, &narrow, 1);
  expect((narrow & 0x7fff) > 0x7f80, "bits", 0, narrow, 0x7fc0, 0);
}

// The values of a row of W: the sum over this one row with weight 1.
std::vector<float> values_of(const Matrix& w, int64_t row) {
  std::vector<float> out(w.cols);
  const float one = 1;
  kernels().matvec_columns(w, row, 1, &one, 1, 1, out.data(), w.cols);
  return out;
}

// The value of the first column of a row of W: its product with a unit vector.
float first_value(const Matrix& w, int64_t row) {
  std::vector<float> x(w.cols);
  x[0] = 1;
  float out = kNaN;
  kernels().matvec_rows(w, row, 1, x.data(), w.cols, 1, &out, 1);
  return out;
}

void check_codes() {
  // Each row holds one code, or one scale and the code for 1.
  std::vector<uint8_t> codes(256 * 32), ones8(256 * 32, 0x38), ones4(256 * 32, 0x22), scales(256), unit_scales(256, 127);
  std::vector<uint8_t> nibbles(256 * 16);
  for (int i = 0; i < 256 * 32; ++i) codes[i] = uint8_t(i / 32);
  for (int i = 0; i < 256 * 16; ++i) nibbles[i] = uint8_t((i / 16 & 15) * 17);
  for (int i = 0; i < 256; ++i) scales[i] = uint8_t(i);
  const Matrix mxfp8{256, 32, Element::f32, Format::mxfp8, 8, 32, codes.data(), unit_scales.data(), nullptr};
  const Matrix mxfp8_scales{256, 32, Element::f32, Format::mxfp8, 8, 32, ones8.data(), scales.data(), nullptr};
  const Matrix mxfp4{256, 32, Element::f32, Format::mxfp4, 4, 32, nibbles.data(), unit_scales.data(), nullptr};
  const Matrix nvfp4_scales{256, 16, Element::f32, Format::nvfp4, 4, 16, ones4.data(), scales.data(), nullptr};
  for (int i = 0; i < 256; ++i) {
    begin("code %d", i);
    const double float8 = (i & 127) == 127 ? double(kNaN) : e4m3(uint8_t(i));
    for (float v : values_of(mxfp8, i)) equal("mxfp8", i, v, float8);
    for (float v : values_of(mxfp4, i)) equal("mxfp4", i, v, e2m1(i & 15));
    for (float v : values_of(nvfp4_scales, i)) equal("nvfp4 scale", i, v, float8);
    const double mx_scale = i == 255 ? double(kNaN) : std::ldexp(1, i - 127);
    for (float v : values_of(mxfp8_scales, i)) equal("mx scale", i, v, mx_scale);
    equal("mxfp8 in a product", i, first_value(mxfp8, i), float8);
    equal("mxfp4 in a product", i, first_value(mxfp4, i), e2m1(i & 15));
    equal("nvfp4 scale in a product", i, first_value(nvfp4_scales, i), float8);
    equal("mx scale in a product", i, first_value(mxfp8_scales, i), mx_scale);
  }
}

void check_exponential() {
  begin("exp");
  std::vector<float> z = sweep(110);
  z.insert(z.end(), {-kInfinity, kNaN, -87.3f, -87.31f, -87.29f, -3e38f, 88.0f});
  std::erase_if(z, [](float x) { return x > 88; });
  const std::vector<float> x = z;
  std::vector<float> p(z.size());
  kernels().log_probabilities(z.data(), 0, int64_t(z.size()), p.data());
  for (size_t i = 0; i < x.size(); ++i) {
    equal("argument", int64_t(i), z[i], x[i]);
    const double exact = std::exp(double(x[i]));
    near("exp", int64_t(i), p[i], x[i] < -87.3f ? 0 : exact, std::isnan(exact) ? 0 : 2 * ulp(exact));
  }
}

void check_tanh() {
  for (float softcap : {1.0f, 30.0f}) {
    begin("softcap %g", softcap);
    std::vector<float> z = sweep(softcap * 100);
    z.insert(z.end(), {kInfinity, -kInfinity, kNaN, 3e38f, -3e38f});
    const std::vector<float> x = z;
    kernels().transform(z.data(), nullptr, int64_t(z.size()), 1, softcap);
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = softcap * std::tanh(double(x[i]) / softcap);
      // The quotient by the softcap may be subnormal, and is rounded once more.
      near("softcap", int64_t(i), z[i], exact, softcap == 1 ? 3e-7 * std::abs(exact) + kSmallest : 5e-7 * std::abs(exact) + softcap * kSmallest);
    }
  }
}

// The difference of logits through a softcap is exact relative to the step if the step is small, however far the model's logit is beyond the softcap.
void check_delta_transform() {
  begin("delta_transform");
  const float softcap = 30, scale = 0.5f;
  for (float model : {0.0f, -3.0f, 20.0f, 90.0f, -300.0f, 1000.0f}) {
    const std::vector<float> steps = sweep(100);
    std::vector<float> d = steps, slope(d.size(), kNaN);
    const std::vector<float> z(d.size(), model);
    kernels().delta_transform(d.data(), z.data(), int64_t(d.size()), scale, softcap, slope.data());
    for (size_t i = 0; i < d.size(); ++i) {
      const double before = double(model) / softcap, step = double(scale) * steps[i] / softcap;
      const double change = std::sinh(step) / (std::cosh(before) * std::cosh(before + step)), bent = 1 / std::cosh(before + step);
      // A subtraction of two tanh is all that a large step needs; the slope's error is that of its exponent.
      const double error = std::abs(step) < 0.49 ? 1e-5 * std::abs(change) : 1e-6;
      near("change", int64_t(i), d[i], softcap * change, softcap * error + 100 * kSmallest);
      near("slope", int64_t(i), slope[i], bent * bent, 2e-6);
    }
  }
}

// exp(t) - 1 and its sums, for t from subnormal to beyond the exponential's range.
void check_delta_add() {
  begin("delta_add");
  for (float t : sweep(39)) {
    float d = t;
    const float lp = -1, p = std::exp(-1.0f);
    DeltaSums sums{};
    sums.top = -kInfinity;
    kernels().delta_add(&d, &lp, &p, nullptr, 1, 0, sums);
    const double rise = p * std::expm1(double(t)), bend = std::abs(t) < 1e-3 ? p * t * (t / 2.0 + double(t) * t / 6) : rise - double(p) * t;
    near("excess", 0, d, rise, 3e-7 * std::abs(rise) + kSmallest);
    equal("sum of excess", 0, sums.excess, d);
    near("curvature", 0, sums.curvature, bend, 1e-6 * std::abs(bend) + kSmallest + (std::abs(t) < 0.5 ? 0 : 1e-6 * std::abs(t)));
    equal("top", 0, sums.top, -kInfinity);
  }
  // Beyond the range: e = exp(lp + t) while it is finite, and the row's largest exponent is recorded.
  const float lp[3] = {-100, -1, -2}, p[3] = {0, 0.36787944f, 0.13533528f};
  float d[3] = {150, 60, -kInfinity};
  DeltaSums sums{};
  sums.top = -kInfinity;
  kernels().delta_add(d, lp, p, nullptr, 3, 0, sums);
  near("far", 0, d[0], std::exp(50.0), 1e-5 * std::exp(50.0));
  near("far", 1, d[1], std::exp(59.0), 1e-5 * std::exp(59.0));
  near("far", 2, d[2], -p[2], 1e-7);
  equal("top", 0, sums.top, 59);
}

void check_softmax_add() {
  begin("softmax_add");
  const float z[11] = {1, 2, -kInfinity, 5, 5, 0, -200, 3, 4, 5, 1};
  SoftmaxSums sums{-kInfinity, -1, 0, 0};
  const std::vector<float> nothing(11, -kInfinity);
  std::vector<float> weights(11, kNaN);
  equal("shrink", 0, kernels().softmax_add(nothing.data(), 0, 11, sums, weights.data()), 1);
  equal("best of nothing", 0, double(sums.best), -1);
  for (int i = 0; i < 11; ++i) equal("weight of nothing", i, weights[i], 0);
  kernels().softmax_add(z, 11, 3, sums, nullptr);
  near("shrink", 1, kernels().softmax_add(z + 3, 14, 8, sums, weights.data()), std::exp(-3.0), 1e-7);
  double sum = 0, moment = 0;
  for (float v : z) {
    sum += std::exp(v - 5.0);
    moment += std::isinf(v) ? 0 : std::exp(v - 5.0) * (v - 5.0);
  }
  equal("top", 0, sums.top, 5);
  equal("best", 0, double(sums.best), 14);
  near("sum", 0, sums.sum, sum, 1e-6);
  near("moment", 0, sums.moment, moment, 1e-6);
  for (int i = 0; i < 8; ++i) near("weight", i, weights[i], std::exp(z[3 + i] - 5.0), 1e-7);
  equal("above", 0, double(kernels().count_above(z, 11, 4)), 3);
  equal("above NaN", 0, double(kernels().count_above(z, 11, kNaN)), 0);
  // A weight of 0 outweighs even an infinite difference.
  const float w[3] = {0, 0.5f, 2}, a[3] = {1, 7, 2}, b[3] = {-kInfinity, 3, 3};
  equal("weighted difference", 0, kernels().weighted_difference(w, a, b, 3), 0);
  const float nan = kNaN;
  kernels().softmax_add(&nan, 22, 1, sums, nullptr);
  equal("sum with NaN", 0, sums.sum, kNaN);
}

}  // namespace

int main() {
  check_elements();
  check_codes();
  check_exponential();
  check_tanh();
  check_delta_transform();
  check_delta_add();
  check_softmax_add();
  return result();
}
