// Rotary position embedding, as mlx.core.fast.rope.
#pragma once

#include <optional>

#include "ops/common.h"

namespace metalens {

// x [..., T, D] floats, D >= dims, dims even; `traditional` rotates neighbors. Position t has the angles (offset + t) scale / periods[i], by default
// base^(2 i / dims). Computed in float32 and rounded once. Gradient of plain MLX.
mx::array rope(
    const mx::array& x,
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    int offset,
    const std::optional<mx::array>& freqs,
    mx::StreamOrDevice s = {});

}  // namespace metalens
