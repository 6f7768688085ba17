// What the operations of a frozen model's forward pass share: views of arrays of any float type, and transformations borrowed from plain MLX.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "cpu/strided.h"
#include "ops/common.h"

namespace metalens {

// The rows along the last axis of an evaluated float array.
inline cpu::StridedRows rows_of(const mx::array& x) {
  return {x.data<void>(), element_of(x.dtype()), {x.shape().begin(), x.shape().end()}, {x.strides().begin(), x.strides().end()}};
}

inline cpu::Output result_in(mx::array& y) {
  return {y.data<void>(), element_of(y.dtype())};
}

// A primitive whose gradient, jvp and vmap are those of the same function in plain MLX: they are rarely needed for a frozen model.
class ForwardPrimitive : public CpuPrimitive {
 public:
  using Function = std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

  // `plain` takes the primitive's inputs.
  ForwardPrimitive(mx::Stream stream, Function plain) : CpuPrimitive(stream), plain_(std::move(plain)) {
  }

  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;

 private:
  // `plain` as a function of the inputs `argnums` alone.
  Function of_some(const std::vector<mx::array>& primals, const std::vector<int>& argnums) const;

  Function plain_;
};

}  // namespace metalens
