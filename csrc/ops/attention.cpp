#include "ops/attention.h"

#include <memory>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "ops/forward.h"

namespace metalens {
namespace {

struct AttentionSpec {
  float scale;
  bool causal, has_mask, has_sinks;
  cpu::Precision precision;

  bool operator==(const AttentionSpec&) const = default;
};

cpu::AttentionMask mask_of(const mx::array& mask) {
  cpu::AttentionMask m{mask.data<void>(), mask.dtype() == mx::bool_, cpu::Element::f32, {}};
  if (!m.booleans) m.element = element_of(mask.dtype());
  std::copy(mask.strides().begin(), mask.strides().end(), m.strides);
  return m;
}

// Inputs: q, k, v, the mask [B, H, T, S] and the sinks, if there are any. The output is [B, T, H, E].
class Attention : public ForwardPrimitive {
 public:
  Attention(mx::Stream stream, AttentionSpec spec, Function plain) : ForwardPrimitive(stream, std::move(plain)), spec_(spec) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [spec = spec_](auto& in, auto& out) {
      if (out[0].size() == 0) return;
      const cpu::Buffer<float> wide(in[0].shape(1));
      const cpu::AttentionInput input{
          .batch = in[0].shape(0),
          .heads = in[0].shape(1),
          .kv_heads = in[1].shape(1),
          .queries = in[0].shape(2),
          .keys = in[1].shape(2),
          .q = rows_of(in[0]),
          .k = rows_of(in[1]),
          .v = rows_of(in[2]),
          .scale = spec.scale,
          .causal = spec.causal,
          .mask = spec.has_mask ? mask_of(in[3]) : cpu::AttentionMask{},
          .sinks = spec.has_sinks ? rows_of(in[3 + spec.has_mask]).read(0, 0, in[0].shape(1), wide.data()) : nullptr,
      };
      cpu::attention(input, spec.precision, result_in(out[0]));
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    const auto& q = inputs[0];
    return {{q.shape(0), q.shape(2), q.shape(1), inputs[2].shape(3)}};
  }
  const char* name() const override {
    return "metalens::Attention";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return spec_ == static_cast<const Attention&>(other).spec_;
  }

 private:
  AttentionSpec spec_;
};

}  // namespace

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& mask,
    const std::optional<mx::array>& sinks,
    const std::string& precision,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (!is_float(q.dtype()) || !is_float(k.dtype()) || !is_float(v.dtype())) reject("q, k and v must be float32, float16 or bfloat16.");
  const bool fits = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && q.shape(0) == k.shape(0) && q.shape(3) == k.shape(3) &&
                    k.shape(0) == v.shape(0) && k.shape(1) == v.shape(1) && k.shape(2) == v.shape(2) && k.shape(1) > 0 &&
                    q.shape(1) % k.shape(1) == 0;
  if (!fits) {
    reject(
        "attention needs q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E], H a multiple of G; got ", q.shape(), ", ", k.shape(), " and ", v.shape(),
        ".");
  }
  if (causal && q.shape(2) > k.shape(2))
    reject("causal attention needs at least as many keys as queries; got ", k.shape(2), " and ", q.shape(2), ".");
  if (causal && mask) reject("give either causal or a mask.");
  std::vector<mx::array> inputs{q, k, v};
  if (mask) {
    const mx::Shape expected{q.shape(0), q.shape(1), q.shape(2), k.shape(2)};
    const bool typed = mask->dtype() == mx::bool_ || is_float(mask->dtype());
    bool broadcasts = mask->ndim() <= 4;
    for (int axis = 1; broadcasts && axis <= int(mask->ndim()); ++axis) {
      broadcasts = mask->shape(-axis) == 1 || mask->shape(-axis) == expected[4 - axis];
    }
    if (!typed || !broadcasts) {
      reject("mask must be booleans or floats that broadcast to ", expected, ", not ", mask->dtype(), " ", mask->shape(), ".");
    }
    inputs.push_back(mx::broadcast_to(*mask, expected, stream));
  }
  if (sinks) {
    if (sinks->shape() != mx::Shape{q.shape(1)} || !is_float(sinks->dtype())) {
      reject("sinks must be ", mx::Shape{q.shape(1)}, " floats, not ", sinks->dtype(), " ", sinks->shape(), ".");
    }
    inputs.push_back(*sinks);
  }
  const AttentionSpec spec{scale, causal, mask.has_value(), sinks.has_value(), precision_named(precision)};
  auto plain = [spec, stream](const std::vector<mx::array>& in) {
    const auto input = [&](bool given, int i) { return given ? std::optional<mx::array>(in[i]) : std::nullopt; };
    const std::string mode = spec.causal ? "causal" : spec.has_mask ? "array" : "";
    const auto y = mx::fast::scaled_dot_product_attention(
        in[0], in[1], in[2], spec.scale, mode, input(spec.has_mask, 3), input(spec.has_sinks, 3 + spec.has_mask), false, stream);
    return std::vector{mx::transpose(y, {0, 2, 1, 3}, stream)};
  };
  auto primitive = std::make_shared<Attention>(stream, spec, plain);
  const auto shape = primitive->output_shapes(inputs)[0];
  return mx::transpose(mx::array(shape, q.dtype(), std::move(primitive), std::move(inputs)), {0, 2, 1, 3}, stream);
}

}  // namespace metalens
