// The norms inside a model, as mlx.core.fast.rms_norm and layer_norm.
#pragma once

#include <optional>

#include "ops/common.h"

namespace metalens {

// gain * x / rms(x) for the rows of x [..., D]; gain [D] or none. The result has the promoted type. Computed in float32 and rounded once. Gradient of
// plain MLX.
mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& gain, float eps, mx::StreamOrDevice s = {});

// gain * (x - mean(x)) / std(x) + bias.
mx::array layer_norm(
    const mx::array& x, const std::optional<mx::array>& gain, const std::optional<mx::array>& bias, float eps, mx::StreamOrDevice s = {});

}  // namespace metalens
