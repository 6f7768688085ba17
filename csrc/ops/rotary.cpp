#include "ops/rotary.h"

#include <memory>

#include "cpu/rotary.h"
#include "mlx/fast.h"
#include "ops/forward.h"

namespace metalens {
namespace {

// Inputs: x, and the periods if they are given.
class Rope : public ForwardPrimitive {
 public:
  Rope(mx::Stream stream, cpu::Rotary rotary, Function plain) : ForwardPrimitive(stream, std::move(plain)), rotary_(std::move(rotary)) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [rotary = rotary_](auto& in, auto& out) mutable {
      if (in.size() > 1) {
        rotary.periods.resize(rotary.dims / 2);
        rows_of(in[1]).copy(0, 0, rotary.dims / 2, rotary.periods.data());
      }
      cpu::rotate_rows(rotary, in[0].shape(-2), rows_of(in[0]), result_in(out[0]));
    });
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  const char* name() const override {
    return "metalens::Rope";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return rotary_ == static_cast<const Rope&>(other).rotary_;
  }

 private:
  cpu::Rotary rotary_;
};

}  // namespace

mx::array rope(
    const mx::array& x,
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    int offset,
    const std::optional<mx::array>& freqs,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (x.ndim() < 2 || !is_float(x.dtype())) reject("x must be [..., T, D] floats, not ", x.dtype(), " ", x.shape(), ".");
  if (dims < 2 || dims % 2 || dims > x.shape(-1)) reject("dims must be even, from 2 to the width ", x.shape(-1), " of x, not ", dims, ".");
  if (base.has_value() == freqs.has_value()) reject("give either base or freqs.");
  if (freqs && (freqs->shape() != mx::Shape{dims / 2} || !is_float(freqs->dtype()))) {
    reject("freqs must be ", mx::Shape{dims / 2}, " floats, not ", freqs->dtype(), " ", freqs->shape(), ".");
  }
  auto plain = [=](const std::vector<mx::array>& in) {
    return std::vector{
        mx::fast::rope(in[0], dims, traditional, base, scale, offset, in.size() > 1 ? std::optional<mx::array>(in[1]) : std::nullopt, stream)};
  };
  std::vector<mx::array> inputs{x};
  if (freqs) inputs.push_back(*freqs);
  const cpu::Rotary rotary{dims, traditional, base.value_or(0), scale, offset, {}};
  return mx::array(x.shape(), x.dtype(), std::make_shared<Rope>(stream, rotary, plain), inputs);
}

}  // namespace metalens
