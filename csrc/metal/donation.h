// An operation with several outputs can be donated an input.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace metalens {

namespace mx = mlx::core;

// MLX gives every output of a primitive its own copy of the list of inputs, so with n outputs each input has n owners, and `is_donatable()` is false.
// MLX drops those copies right after the evaluation. Call this at the start of eval_cpu or eval_gpu to drop them before: of all outputs but the one
// whose list `inputs` is. An output that is being traced keeps its inputs, as in MLX.
inline void release_inputs_of_siblings(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& output : outputs) {
    if (!output.is_tracer() && output.inputs().data() != inputs.data()) output.inputs().clear();
  }
}

}  // namespace metalens
