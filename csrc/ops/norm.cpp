#include "ops/norm.h"

#include <memory>

#include "cpu/buffer.h"
#include "cpu/norm_rows.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "ops/forward.h"

namespace metalens {
namespace {

// Inputs: x, then gain and bias, each if there is one.
class NormRows : public ForwardPrimitive {
 public:
  NormRows(mx::Stream stream, bool center, float eps, bool has_gain, bool has_bias, Function plain)
      : ForwardPrimitive(stream, std::move(plain)), center_(center), eps_(eps), has_gain_(has_gain), has_bias_(has_bias) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [center = center_, eps = eps_, has_gain = has_gain_, has_bias = has_bias_](auto& in, auto& out) {
      const int64_t d = in[0].shape(-1);
      const cpu::Buffer<float> wide(2 * d);
      const float* gain = has_gain ? rows_of(in[1]).read(0, 0, d, wide.data()) : nullptr;
      const float* bias = has_bias ? rows_of(in[1 + has_gain]).read(0, 0, d, wide.data() + d) : nullptr;
      cpu::norm_rows(rows_of(in[0]), {true, center, eps, gain, bias}, result_in(out[0]));
    });
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  const char* name() const override {
    return center_ ? "metalens::LayerNorm" : "metalens::RMSNorm";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const NormRows&>(other);
    return center_ == o.center_ && eps_ == o.eps_ && has_gain_ == o.has_gain_ && has_bias_ == o.has_bias_;
  }

 private:
  bool center_;
  float eps_;
  bool has_gain_, has_bias_;
};

mx::array build(
    const mx::array& x,
    const std::optional<mx::array>& gain,
    const std::optional<mx::array>& bias,
    bool center,
    float eps,
    mx::Stream stream,
    ForwardPrimitive::Function plain) {
  if (x.ndim() < 1 || !is_float(x.dtype()) || x.shape(-1) == 0) reject("x must be [..., D] floats, D >= 1, not ", x.dtype(), " ", x.shape(), ".");
  std::vector<mx::array> inputs{x};
  auto dtype = x.dtype();
  for (const auto& v : {gain, bias}) {
    if (!v) continue;
    if (v->shape() != mx::Shape{x.shape(-1)} || !is_float(v->dtype())) {
      reject("gain and bias must be ", mx::Shape{x.shape(-1)}, " floats, not ", v->dtype(), " ", v->shape(), ".");
    }
    dtype = mx::promote_types(dtype, v->dtype());
    inputs.push_back(*v);
  }
  auto primitive = std::make_shared<NormRows>(stream, center, eps, gain.has_value(), bias.has_value(), std::move(plain));
  return mx::array(x.shape(), dtype, std::move(primitive), std::move(inputs));
}

}  // namespace

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& gain, float eps, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  auto plain = [=, has_gain = gain.has_value()](const std::vector<mx::array>& in) {
    return std::vector{mx::fast::rms_norm(in[0], has_gain ? std::optional<mx::array>(in[1]) : std::nullopt, eps, stream)};
  };
  return build(x, gain, std::nullopt, false, eps, stream, plain);
}

mx::array layer_norm(
    const mx::array& x, const std::optional<mx::array>& gain, const std::optional<mx::array>& bias, float eps, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  auto plain = [=, has_gain = gain.has_value(), has_bias = bias.has_value()](const std::vector<mx::array>& in) {
    return std::vector{mx::fast::layer_norm(
        in[0], has_gain ? std::optional<mx::array>(in[1]) : std::nullopt, has_bias ? std::optional<mx::array>(in[1 + has_gain]) : std::nullopt, eps,
        stream)};
  };
  return build(x, gain, bias, true, eps, stream, plain);
}

}  // namespace metalens
