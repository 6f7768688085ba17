#include "ops/linear.h"

#include <memory>

#include "cpu/gemm.h"
#include "mlx/ops.h"

namespace metalens {
namespace {

// Build the node of the graph: flatten x's leading axes, make all arrays row-contiguous, restore the axes.
mx::array build(const mx::array& x, const Weight& weight, mx::Dtype dtype, bool transpose, cpu::Precision precision, mx::Stream stream) {
  if (!is_float(x.dtype())) reject("x must be float32, float16 or bfloat16, not ", x.dtype(), ".");
  if (!is_float(dtype)) reject("dtype must be float32, float16 or bfloat16, not ", dtype, ".");
  const int64_t reduced = transpose ? weight.columns() : weight.rows();
  const int64_t columns = transpose ? weight.rows() : weight.columns();
  if (x.ndim() < 1 || x.shape(-1) != reduced) {
    reject(
        "x must have ", reduced, " elements along its last axis for a weight [", weight.rows(), ", ", weight.columns(), "], transpose=", transpose,
        "; its shape is ", x.shape(), ".");
  }
  int rows = 1;
  for (size_t i = 0; i + 1 < x.ndim(); ++i) rows *= x.shape(int(i));
  auto inputs = weight.inputs(stream);
  inputs.insert(inputs.begin(), contiguous(x.ndim() == 2 ? x : mx::reshape(x, {rows, x.shape(-1)}, stream), stream));
  auto primitive = std::make_shared<Linear>(stream, transpose, weight.spec, precision, dtype);
  auto out = mx::array({rows, int(columns)}, dtype, primitive, inputs);
  if (x.ndim() == 2) return out;
  auto shape = x.shape();
  shape.back() = int(columns);
  return mx::reshape(out, shape, stream);
}

void evaluate(const mx::array& x, const cpu::Matrix& w, bool transpose, cpu::Precision precision, mx::array& out) {
  const cpu::Rows rows{x.data<void>(), element_of(x.dtype())};
  const cpu::Result result{out.data<void>(), element_of(out.dtype())};
  cpu::gemm(rows, out.shape(0), out.shape(1), x.shape(1), w, transpose, precision, result);
}

}  // namespace

mx::array quantized_matmul(
    const mx::array& x,
    const mx::array& w,
    const mx::array& scales,
    const std::optional<mx::array>& biases,
    int group_size,
    int bits,
    bool transpose,
    const std::string& mode,
    std::optional<mx::Dtype> dtype,
    const std::string& precision,
    mx::StreamOrDevice s) {
  const auto weight = make_weight(w, scales, biases, group_size, bits, mode);
  return build(x, weight, dtype.value_or(x.dtype()), transpose, precision_named(precision), cpu_stream(s));
}

mx::array matmul(
    const mx::array& x, const mx::array& w, bool transpose, std::optional<mx::Dtype> dtype, const std::string& precision, mx::StreamOrDevice s) {
  const auto weight = make_weight(w, {}, {}, 0, 0, "affine");
  return build(x, weight, dtype.value_or(mx::promote_types(x.dtype(), w.dtype())), transpose, precision_named(precision), cpu_stream(s));
}

void Linear::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  dispatch(stream(), inputs, outputs, [transpose = transpose_, weight = weight_, precision = precision_](auto& in, auto& out) {
    evaluate(in[0], weight.matrix(&in[1]), transpose, precision, out[0]);
  });
}

mx::array Linear::apply(const mx::array& x, const std::vector<mx::array>& inputs, bool transpose, mx::Dtype dtype) {
  return build(x, {weight_, {inputs.begin() + 1, inputs.end()}}, dtype, transpose, precision_, stream());
}

std::vector<mx::array> Linear::jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) {
  std::optional<mx::array> sum;
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (!is_dense() && argnums[i] != 0) reject("a quantized weight is frozen: only x can be differentiated.");
    auto term = argnums[i] == 0 ? apply(tangents[i], primals, transpose_, dtype_) : apply(primals[0], {primals[0], tangents[i]}, transpose_, dtype_);
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
      grads.push_back(apply(g, primals, !transpose_, primals[0].dtype()));
    } else if (!is_dense()) {
      reject("a quantized weight is frozen: only x can be differentiated.");
    } else {
      // y = x W^T: dW = g^T x;  y = x W: dW = x^T g
      const auto& left = transpose_ ? g : primals[0];
      const auto& right = transpose_ ? primals[0] : g;
      grads.push_back(apply(mx::transpose(left, stream()), {left, right}, false, primals[1].dtype()));
    }
  }
  return grads;
}

std::pair<std::vector<mx::array>, std::vector<int>> Linear::vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  for (size_t i = 1; i < axes.size(); ++i) {
    if (axes[i] >= 0) reject("vmap over the weight is not supported: map over x, or loop.");
  }
  return {{apply(mx::moveaxis(inputs[0], axes[0], 0, stream()), inputs, transpose_, dtype_)}, {0}};
}

bool Linear::is_equivalent(const mx::Primitive& other) const {
  const auto& o = static_cast<const Linear&>(other);
  return transpose_ == o.transpose_ && weight_ == o.weight_ && precision_ == o.precision_ && dtype_ == o.dtype_;
}

std::vector<mx::Shape> Linear::output_shapes(const std::vector<mx::array>& inputs) {
  const auto& w = inputs[1];
  return {{inputs[0].shape(0), int(transpose_ ? w.shape(0) : weight_.columns(w))}};
}

}  // namespace metalens
