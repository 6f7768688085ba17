#include "ops/attention.h"

#include <memory>

#include "cpu/attention.h"
#include "mlx/ops.h"

namespace metalens {
namespace {

// Inputs: q, k, v, and a mask if there is one.
class Attention : public CpuPrimitive {
 public:
  Attention(mx::Stream stream, float scale, bool causal, cpu::Precision precision)
      : CpuPrimitive(stream), scale_(scale), causal_(causal), precision_(precision) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [scale = scale_, causal = causal_, precision = precision_](auto& in, auto& out) {
      if (out[0].size() == 0) return;
      cpu::AttentionInput input{};
      input.batch = in[0].shape(0);
      input.heads = in[0].shape(1);
      input.kv_heads = in[1].shape(1);
      input.queries = in[0].shape(2);
      input.keys = in[1].shape(2);
      input.d = in[0].shape(3);
      input.d_value = in[2].shape(3);
      input.q = in[0].template data<float>();
      input.k = in[1].template data<float>();
      input.v = in[2].template data<float>();
      input.scale = scale;
      input.causal = causal;
      input.mask = in.size() > 3 ? in[3].template data<float>() : nullptr;
      cpu::attention(input, precision, out[0].template data<float>());
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.back() = inputs[2].shape(3);
    return {shape};
  }
  const char* name() const override {
    return "metalens::Attention";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Attention&>(other);
    return scale_ == o.scale_ && causal_ == o.causal_ && precision_ == o.precision_;
  }

 private:
  float scale_;
  bool causal_;
  cpu::Precision precision_;
};

}  // namespace

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& mask,
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
  std::vector<mx::array> inputs{as_rows(q, stream), as_rows(k, stream), as_rows(v, stream)};
  if (mask) {
    const mx::Shape expected{q.shape(2), k.shape(2)};
    if (mask->shape() != expected || !is_float(mask->dtype()))
      reject("mask must be ", expected, " floats, not ", mask->dtype(), " ", mask->shape(), ".");
    inputs.push_back(as_rows(*mask, stream));
  }
  auto primitive = std::make_shared<Attention>(stream, scale, causal, precision_named(precision));
  const auto out = mx::array::make_arrays(primitive->output_shapes(inputs), {mx::float32}, primitive, inputs);
  return mx::astype(out[0], q.dtype(), stream);
}

}  // namespace metalens
