#include "ops/activation.h"

#include <memory>
#include <string_view>
#include <unordered_set>

#include "cpu/elementwise.h"
#include "mlx/ops.h"
#include "ops/forward.h"

namespace metalens {
namespace {

using cpu::Elementwise;

// Allocate y, in the memory of an input that nothing else needs if there is one, and compute it.
void evaluate(mx::Stream stream, Elementwise function, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const mx::array* reused = nullptr;
  for (const auto& input : inputs) {
    if (input.is_donatable() && input.dtype() == outputs[0].dtype() && input.flags().row_contiguous && input.data_size() == outputs[0].size()) {
      reused = &input;
    }
  }
  dispatch(
      stream, inputs, outputs,
      [function](auto& in, auto& out) {
        cpu::elementwise(function, rows_of(in[0]), in.size() > 1 ? rows_of(in[1]) : cpu::StridedRows{}, result_in(out[0]));
      },
      reused);
}

class Activation : public ForwardPrimitive {
 public:
  Activation(mx::Stream stream, Elementwise function, Function plain) : ForwardPrimitive(stream, std::move(plain)), function_(function) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    evaluate(stream(), function_, inputs, outputs);
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  const char* name() const override {
    return function_ == Elementwise::swiglu ? "metalens::SwiGLU" : "metalens::GeluTanh";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return function_ == static_cast<const Activation&>(other).function_;
  }

 private:
  Elementwise function_;
};

// A sum or product that was MLX's. All but its evaluation is still MLX's.
class AdoptedSum : public CpuPrimitive {
 public:
  AdoptedSum(std::shared_ptr<mx::Primitive> original, Elementwise function)
      : CpuPrimitive(original->stream()), original_(std::move(original)), function_(function) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    evaluate(stream(), function_, inputs, outputs);
  }
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override {
    return original_->vjp(primals, cotangents, argnums, outputs);
  }
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) override {
    return original_->jvp(primals, tangents, argnums);
  }
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    return original_->vmap(inputs, axes);
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return original_->output_shapes(inputs);
  }
  const char* name() const override {
    return function_ == Elementwise::add ? "metalens::Add" : "metalens::Multiply";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return function_ == static_cast<const AdoptedSum&>(other).function_;
  }

 private:
  std::shared_ptr<mx::Primitive> original_;
  Elementwise function_;
};

void adopt(mx::array& y) {
  const auto& inputs = y.inputs();
  const auto& primitive = y.primitive_ptr();
  const std::string_view name = primitive->name();
  const bool sum = name == "Add", product = name == "Multiply";
  if ((!sum && !product) || inputs.size() != 2 || primitive->device() != mx::Device::cpu || !is_float(y.dtype())) return;
  for (const auto& input : inputs) {
    if (input.dtype() != y.dtype() || input.shape() != y.shape()) return;
  }
  y.primitive_ptr() = std::make_shared<AdoptedSum>(primitive, sum ? Elementwise::add : Elementwise::multiply);
}

}  // namespace

mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (gate.shape() != x.shape() || gate.dtype() != x.dtype() || !is_float(x.dtype())) {
    reject("gate and x must have one shape and one float type; they are ", gate.dtype(), " ", gate.shape(), " and ", x.dtype(), " ", x.shape(), ".");
  }
  auto plain = [stream](const std::vector<mx::array>& in) {
    return std::vector{mx::multiply(mx::multiply(in[0], mx::sigmoid(in[0], stream), stream), in[1], stream)};
  };
  return mx::array(x.shape(), x.dtype(), std::make_shared<Activation>(stream, Elementwise::swiglu, plain), {gate, x});
}

mx::array gelu_tanh(const mx::array& x, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (!is_float(x.dtype())) reject("x must be float32, float16 or bfloat16, not ", x.dtype(), ".");
  auto plain = [stream](const std::vector<mx::array>& in) {
    const auto number = [&](float value) { return mx::array(value, in[0].dtype()); };
    const auto cube = mx::multiply(mx::multiply(in[0], in[0], stream), in[0], stream);
    const auto inner = mx::multiply(number(0.7978845608028654f), mx::add(in[0], mx::multiply(number(0.044715f), cube, stream), stream), stream);
    const auto outer = mx::add(number(1), mx::tanh(inner, stream), stream);
    return std::vector{mx::multiply(mx::multiply(number(0.5f), in[0], stream), outer, stream)};
  };
  return mx::array(x.shape(), x.dtype(), std::make_shared<Activation>(stream, Elementwise::gelu_tanh, plain), {x});
}

void run_sums_natively(const std::vector<mx::array>& outputs) {
  std::vector<mx::array> todo(outputs.begin(), outputs.end());
  std::unordered_set<std::uintptr_t> seen;
  while (!todo.empty()) {
    mx::array y = std::move(todo.back());
    todo.pop_back();
    if (!y.has_primitive() || y.status() != mx::array::Status::unscheduled || y.is_tracer() || !seen.insert(y.id()).second) continue;
    adopt(y);
    todo.insert(todo.end(), y.inputs().begin(), y.inputs().end());
  }
}

}  // namespace metalens
