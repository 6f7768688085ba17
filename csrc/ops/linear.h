// Products with a frozen matrix, dense or quantised, as MLX operations on the CPU.
#pragma once

#include <optional>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace metalens {

namespace mx = mlx::core;

// x W^T (transpose) or x W, for W in MLX's affine format: w [O, I * bits / 32] uint32, scales and biases [O, I / group_size]. x is [..., I] or, not
// transposed, [..., O], in float32, float16 or bfloat16, and so is the result. Accumulates in float32. Differentiable in x; the weight is frozen.
mx::array quantized_matmul(
    const mx::array& x,
    const mx::array& w,
    const mx::array& scales,
    const mx::array& biases,
    int group_size,
    int bits,
    bool transpose,
    mx::StreamOrDevice s = {});

// x W^T (transpose) or x W, for a dense W [O, I]. Accumulates in float32; the result has the promoted type. Differentiable in both.
mx::array matmul(const mx::array& x, const mx::array& w, bool transpose, mx::StreamOrDevice s = {});

// The one primitive behind both. Inputs: x [M, K] row-contiguous, then w, or w, scales and biases.
class Linear : public mx::UnaryPrimitive {
 public:
  Linear(mx::Stream stream, bool transpose, int group_size, int bits)
      : mx::UnaryPrimitive(stream), transpose_(transpose), group_size_(group_size), bits_(bits) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;

  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;

  const char* name() const override {
    return bits_ ? "metalens::QuantizedMatmul" : "metalens::Matmul";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  // The same product with another x, or with the other orientation.
  mx::array apply(const mx::array& x, const std::vector<mx::array>& inputs, bool transpose);

  bool transpose_;
  int group_size_;
  int bits_;  // 0: dense
};

}  // namespace metalens
