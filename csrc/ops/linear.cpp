#include "ops/linear.h"

#include <algorithm>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace metalens {
namespace {

template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  message << "[metalens] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

bool is_supported(mx::Dtype t) {
  return t == mx::float32 || t == mx::float16 || t == mx::bfloat16;
}

cpu::Element element_of(mx::Dtype t) {
  return t == mx::float16 ? cpu::Element::f16 : t == mx::bfloat16 ? cpu::Element::bf16 : cpu::Element::f32;
}

mx::Stream cpu_stream(mx::StreamOrDevice s) {
  mx::Stream stream = std::holds_alternative<std::monostate>(s) ? mx::default_stream(mx::Device(mx::Device::cpu)) : mx::to_stream(s);
  if (stream.device != mx::Device::cpu) reject("this operation runs on the CPU. Pass stream=mx.cpu, or none.");
  return stream;
}

// Build the node: flatten x's leading axes, make everything row-contiguous, restore the axes.
mx::array build(
    const mx::array& x, std::vector<mx::array> weight, mx::Dtype type, int columns, bool transpose, int group_size, int bits, mx::Stream stream) {
  int rows = 1;
  for (size_t i = 0; i + 1 < x.ndim(); ++i) rows *= x.shape(int(i));
  auto flat = mx::reshape(x, {rows, x.shape(-1)}, stream);
  std::vector<mx::array> inputs{mx::contiguous(flat, false, stream)};
  for (auto& w : weight) inputs.push_back(mx::contiguous(w, false, stream));
  auto primitive = std::make_shared<Linear>(stream, transpose, group_size, bits);
  auto out = mx::array({rows, columns}, type, primitive, inputs);
  auto shape = x.shape();
  shape.back() = columns;
  return mx::reshape(out, shape, stream);
}

void evaluate(const mx::array& x, const cpu::Matrix& w, bool transpose, mx::array& out) {
  const int64_t m = out.shape(0), n = out.shape(1), k = x.shape(1);
  if (m == 0 || n == 0) return;
  const auto& table = cpu::kernels();
  std::vector<float> wide_x, wide_out;
  const float* a = nullptr;
  if (x.dtype() == mx::float32) {
    a = x.data<float>();
  } else {
    wide_x.resize(m * k);
    table.load(element_of(x.dtype()), x.data<void>(), wide_x.data(), m * k);
    a = wide_x.data();
  }
  float* c = nullptr;
  if (out.dtype() == mx::float32) {
    c = out.data<float>();
  } else {
    wide_out.resize(m * n);
    c = wide_out.data();
  }
  cpu::gemm(a, m, n, k, w, transpose, c);
  if (out.dtype() != mx::float32) table.store(element_of(out.dtype()), c, out.data<void>(), m * n);
}

}  // namespace

mx::array quantized_matmul(
    const mx::array& x,
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    int group_size,
    int bits,
    bool transpose,
    mx::StreamOrDevice s) {
  if (bits < 2 || bits > 8 || bits == 7) reject("bits must be 2, 3, 4, 5, 6 or 8, not ", bits, ".");
  if (group_size != 32 && group_size != 64 && group_size != 128) reject("group_size must be 32, 64 or 128, not ", group_size, ".");
  if (!is_supported(x.dtype())) reject("x must be float32, float16 or bfloat16, not ", x.dtype(), ".");
  if (w.dtype() != mx::uint32 || w.ndim() != 2) reject("w must be a uint32 array [O, I * bits / 32], not ", w.dtype(), " ", w.shape(), ".");
  if (!is_supported(scales.dtype()) || scales.dtype() != biases.dtype()) {
    reject("scales and biases must share one of float32, float16, bfloat16; they are ", scales.dtype(), " and ", biases.dtype(), ".");
  }
  const int64_t inner = int64_t(w.shape(1)) * 32 / bits;
  const mx::Shape expected{w.shape(0), int(inner / group_size)};
  if (inner % group_size || int64_t(w.shape(1)) * 32 % bits || scales.shape() != expected || biases.shape() != expected) {
    reject(
        "w ", w.shape(), " with bits=", bits, " and group_size=", group_size, " needs scales and biases [O, I / group_size]; they are ",
        scales.shape(), " and ", biases.shape(), ".");
  }
  const int64_t reduced = transpose ? inner : w.shape(0);
  const int64_t columns = transpose ? w.shape(0) : inner;
  if (x.ndim() < 1 || x.shape(-1) != reduced) {
    reject(
        "x must have ", reduced, " elements along its last axis for a weight [", w.shape(0), ", ", inner, "], transpose=", transpose,
        "; its shape is ", x.shape(), ".");
  }
  return build(x, {w, scales, biases}, x.dtype(), int(columns), transpose, group_size, bits, cpu_stream(s));
}

mx::array matmul(const mx::array& x, const mx::array& w, bool transpose, mx::StreamOrDevice s) {
  if (!is_supported(x.dtype()) || !is_supported(w.dtype())) {
    reject("x and w must be float32, float16 or bfloat16, not ", x.dtype(), " and ", w.dtype(), ".");
  }
  if (w.ndim() != 2) reject("w must be a matrix, not ", w.shape(), ".");
  if (x.ndim() < 1 || x.shape(-1) != w.shape(transpose ? 1 : 0)) {
    reject("x ", x.shape(), " and w ", w.shape(), " do not match, transpose=", transpose, ".");
  }
  return build(x, {w}, mx::promote_types(x.dtype(), w.dtype()), w.shape(transpose ? 0 : 1), transpose, 0, 0, cpu_stream(s));
}

void Linear::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) encoder.set_input_array(input);
  encoder.set_output_array(out);
  std::vector<mx::array> held;
  for (const auto& input : inputs) held.push_back(mx::array::unsafe_weak_copy(input));
  encoder.dispatch(
      [inputs = std::move(held), out = mx::array::unsafe_weak_copy(out), transpose = transpose_, group_size = group_size_, bits = bits_]() mutable {
        const auto& weight = inputs[1];
        cpu::Matrix w{};
        w.rows = weight.shape(0);
        w.cols = bits ? int64_t(weight.shape(1)) * 32 / bits : weight.shape(1);
        w.element = element_of(bits ? inputs[2].dtype() : weight.dtype());
        w.bits = bits;
        w.group_size = group_size;
        w.values = weight.data<void>();
        w.scales = bits ? inputs[2].data<void>() : nullptr;
        w.biases = bits ? inputs[3].data<void>() : nullptr;
        evaluate(inputs[0], w, transpose, out);
      });
}

void Linear::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::runtime_error("[metalens] this operation has no GPU implementation.");
}

mx::array Linear::apply(const mx::array& x, const std::vector<mx::array>& inputs, bool transpose) {
  return bits_ ? quantized_matmul(x, inputs[1], inputs[2], inputs[3], group_size_, bits_, transpose, stream())
               : matmul(x, inputs[1], transpose, stream());
}

std::vector<mx::array> Linear::jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) {
  std::optional<mx::array> sum;
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (bits_ && argnums[i] != 0) reject("a quantised weight is frozen: only x can be differentiated.");
    auto term = argnums[i] == 0 ? apply(tangents[i], primals, transpose_) : matmul(primals[0], tangents[i], transpose_, stream());
    sum = sum ? mx::add(*sum, term, stream()) : term;
  }
  return {*sum};
}

std::vector<mx::array> Linear::vjp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums, const std::vector<mx::array>&) {
  std::vector<mx::array> grads;
  const auto& g = cotangents[0];
  for (int argnum : argnums) {
    if (argnum == 0) {
      grads.push_back(mx::astype(apply(g, primals, !transpose_), primals[0].dtype(), stream()));
    } else if (bits_) {
      reject("a quantised weight is frozen: only x can be differentiated.");
    } else {
      // y = x W^T: dW = g^T x;  y = x W: dW = x^T g
      const auto& left = transpose_ ? g : primals[0];
      const auto& right = transpose_ ? primals[0] : g;
      auto dw = matmul(mx::transpose(left, stream()), right, false, stream());
      grads.push_back(mx::astype(dw, primals[1].dtype(), stream()));
    }
  }
  return grads;
}

std::pair<std::vector<mx::array>, std::vector<int>> Linear::vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  for (size_t i = 1; i < axes.size(); ++i) {
    if (axes[i] >= 0) reject("vmap over the weight is not supported: map over x, or loop.");
  }
  return {{apply(mx::moveaxis(inputs[0], axes[0], 0, stream()), inputs, transpose_)}, {0}};
}

bool Linear::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const Linear&>(other);
  return transpose_ == o.transpose_ && group_size_ == o.group_size_ && bits_ == o.bits_;
}

std::vector<mx::Shape> Linear::output_shapes(const std::vector<mx::array>& inputs) {
  const auto& w = inputs[1];
  const int columns = transpose_ ? w.shape(0) : bits_ ? int(int64_t(w.shape(1)) * 32 / bits_) : w.shape(1);
  return {{inputs[0].shape(0), columns}};
}

}  // namespace metalens
