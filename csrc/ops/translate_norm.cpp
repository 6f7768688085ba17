#include "ops/translate_norm.h"

#include <memory>

#include "cpu/translate_norm.h"
#include "mlx/ops.h"
#include "ops/linear.h"

namespace metalens {
namespace {

// The norm without its arrays. Up to two inputs hold those: gain, then bias, each if there is one.
struct NormSpec {
  bool enabled, center;
  float eps;
  bool has_gain, has_bias;

  bool operator==(const NormSpec&) const = default;

  cpu::Norm norm(const mx::array* first) const {
    return {enabled, center, eps, has_gain ? first->data<float>() : nullptr, has_bias ? first[has_gain].data<float>() : nullptr};
  }
};

// dy from y and dn. Inputs: y, dn [N, D], the norm's arrays.
class NormBackward : public CpuPrimitive {
 public:
  NormBackward(mx::Stream stream, NormSpec norm) : CpuPrimitive(stream), norm_(norm) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [spec = norm_](auto& in, auto& out) {
      const auto norm = spec.norm(in.data() + 2);
      cpu::norm_backward(
          in[0].template data<float>(), in[1].template data<float>(), in[0].shape(0), in[0].shape(1), norm, out[0].template data<float>());
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  const char* name() const override {
    return "metalens::NormBackward";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return norm_ == static_cast<const NormBackward&>(other).norm_;
  }

 private:
  NormSpec norm_;
};

// dw [D, D] and db [D] of a translator. Inputs: h, y, dn [N, D], the norm's arrays.
class TranslatorGradient : public CpuPrimitive {
 public:
  TranslatorGradient(mx::Stream stream, NormSpec norm, cpu::Precision precision) : CpuPrimitive(stream), norm_(norm), precision_(precision) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [spec = norm_, precision = precision_](auto& in, auto& out) {
      const auto norm = spec.norm(in.data() + 3);
      cpu::translator_gradient(
          in[0].template data<float>(), in[1].template data<float>(), in[2].template data<float>(), in[0].shape(0), in[0].shape(1), norm, precision,
          out[0].template data<float>(), out[1].template data<float>());
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    const int d = inputs[0].shape(1);
    return {{d, d}, {d}};
  }
  const char* name() const override {
    return "metalens::TranslatorGradient";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const TranslatorGradient&>(other);
    return norm_ == o.norm_ && precision_ == o.precision_;
  }

 private:
  NormSpec norm_;
  cpu::Precision precision_;
};

// Inputs: h [N, D], w and b if there are any, the norm's arrays. Outputs: n and, for the gradient, y.
class TranslateNorm : public CpuPrimitive {
 public:
  TranslateNorm(mx::Stream stream, NormSpec norm, bool has_w, bool has_b, cpu::Precision precision)
      : CpuPrimitive(stream), norm_(norm), has_w_(has_w), has_b_(has_b), precision_(precision) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [spec = norm_, has_w = has_w_, has_b = has_b_, precision = precision_](auto& in, auto& out) {
      const cpu::Matrix w = has_w ? WeightSpec{}.matrix(&in[1]) : cpu::Matrix{};
      const float* b = has_b ? in[1 + has_w].template data<float>() : nullptr;
      cpu::translate_norm(
          in[0].template data<float>(), in[0].shape(0), in[0].shape(1), has_w ? &w : nullptr, b, spec.norm(in.data() + 1 + has_w + has_b), precision,
          out[1].template data<float>(), out[0].template data<float>());
    });
  }

  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override {
    const std::vector<mx::array> norm(primals.begin() + 1 + has_w_ + has_b_, primals.end());
    const auto dn = mx::contiguous(cotangents[0], false, stream());
    auto with_norm = [&](std::vector<mx::array> inputs) {
      inputs.insert(inputs.end(), norm.begin(), norm.end());
      return inputs;
    };
    std::optional<mx::array> dy;
    auto at_y = [&]() -> const mx::array& {
      if (!dy) dy = mx::array(outputs[1].shape(), mx::float32, std::make_shared<NormBackward>(stream(), norm_), with_norm({outputs[1], dn}));
      return *dy;
    };
    std::vector<mx::array> of_translator;
    auto translator = [&](int i) {
      if (of_translator.empty()) {
        auto primitive = std::make_shared<TranslatorGradient>(stream(), norm_, precision_);
        const auto inputs = with_norm({primals[0], outputs[1], dn});
        of_translator = mx::array::make_arrays(primitive->output_shapes(inputs), {mx::float32, mx::float32}, primitive, inputs);
      }
      return of_translator[i];
    };
    const std::string precision = precision_ == cpu::Precision::bf16 ? "bf16" : "float32";
    std::vector<mx::array> grads;
    for (int argnum : argnums) {
      if (argnum == 0) {
        grads.push_back(has_w_ ? matmul(at_y(), primals[1], false, mx::float32, precision, stream()) : at_y());
      } else if (argnum == 1 && has_w_) {
        grads.push_back(translator(0));
      } else if (argnum == 1 + has_w_ && has_b_) {
        grads.push_back(has_w_ ? translator(1) : mx::sum(at_y(), 0, false, stream()));
      } else {
        reject("translate_norm is differentiable in h, w and b: the norm is frozen. Use mx.stop_gradient on it.");
      }
    }
    return grads;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[0].shape()};
  }
  const char* name() const override {
    return "metalens::TranslateNorm";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const TranslateNorm&>(other);
    return norm_ == o.norm_ && has_w_ == o.has_w_ && has_b_ == o.has_b_ && precision_ == o.precision_;
  }

 private:
  NormSpec norm_;
  bool has_w_, has_b_;
  cpu::Precision precision_;
};

void check_vector(const std::optional<mx::array>& v, const char* name, int d) {
  if (v && (v->shape() != mx::Shape{d} || !is_float(v->dtype()))) {
    reject(name, " must be ", mx::Shape{d}, " floats, not ", v->dtype(), " ", v->shape(), ".");
  }
}

}  // namespace

mx::array translate_norm(
    const mx::array& h,
    const std::optional<mx::array>& w,
    const std::optional<mx::array>& b,
    const std::string& norm,
    const std::optional<mx::array>& gain,
    const std::optional<mx::array>& norm_bias,
    float eps,
    const std::string& precision,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (norm != "rms" && norm != "layer" && norm != "none") reject("norm must be 'rms', 'layer' or 'none', not '", norm, "'.");
  if (h.ndim() < 1 || !is_float(h.dtype())) reject("h must be [..., D] floats, not ", h.dtype(), " ", h.shape(), ".");
  const int d = h.shape(-1);
  if (w && (w->shape() != mx::Shape{d, d} || !is_float(w->dtype()))) {
    reject("w must be ", mx::Shape{d, d}, " floats, not ", w->dtype(), " ", w->shape(), ".");
  }
  if (d == 0) reject("h must have at least one column.");
  check_vector(b, "b", d);
  check_vector(gain, "the norm's weight", d);
  check_vector(norm_bias, "the norm's bias", d);
  const bool enabled = norm != "none";
  if (!enabled && (gain || norm_bias)) reject("norm 'none' has no weight and no bias.");
  const NormSpec spec{enabled, norm == "layer", eps, gain.has_value(), norm_bias.has_value()};
  std::vector<mx::array> inputs{as_rows(mx::reshape(h, {int(h.size() / d), d}, stream), stream)};
  for (const auto& v : {w, b, gain, norm_bias}) {
    if (v) inputs.push_back(as_rows(*v, stream));
  }
  auto primitive = std::make_shared<TranslateNorm>(stream, spec, w.has_value(), b.has_value(), precision_named(precision));
  const auto outputs = mx::array::make_arrays(primitive->output_shapes(inputs), {mx::float32, mx::float32}, primitive, inputs);
  return mx::reshape(outputs[0], h.shape(), stream);
}

}  // namespace metalens
