// Products with a frozen matrix, dense or quantized, as MLX operations on the CPU.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/weight.h"

namespace metalens {

// x W^T (transpose) or x W for a quantized W [O, I]. x is [..., I] or, without transpose, [..., O]: float32, float16 or bfloat16. The result has
// `dtype`, by default the type of x. Sums are float32. Differentiable in x; the weight is frozen.
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
    mx::StreamOrDevice s = {});

// x W^T (transpose) or x W, for a dense W [O, I]. Sums are float32. The result has `dtype`, by default the promoted type. Differentiable
// in both.
mx::array matmul(
    const mx::array& x, const mx::array& w, bool transpose, std::optional<mx::Dtype> dtype, const std::string& precision, mx::StreamOrDevice s = {});

// The primitive behind both. Inputs: x [M, K] row-contiguous, then the weight's arrays.
class Linear : public CpuPrimitive {
 public:
  Linear(mx::Stream stream, bool transpose, WeightSpec weight, cpu::Precision precision, mx::Dtype dtype)
      : CpuPrimitive(stream), transpose_(transpose), weight_(weight), precision_(precision), dtype_(dtype) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;

  const char* name() const override {
    return is_dense() ? "metalens::Matmul" : "metalens::QuantizedMatmul";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  bool is_dense() const {
    return weight_.format == cpu::Format::dense;
  }
  // The same product with another x, or with the other orientation.
  mx::array apply(const mx::array& x, const std::vector<mx::array>& inputs, bool transpose, mx::Dtype dtype);

  bool transpose_;
  WeightSpec weight_;
  cpu::Precision precision_;
  mx::Dtype dtype_;
};

}  // namespace metalens
