// n = norm(h W^T + b): a translator and the final norm, with their gradient.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/common.h"

namespace metalens {

// h [..., D], w [D, D] or none for the identity, b [D] or none; norm is "rms", "layer" or "none", with gain and bias [D] or none. Returns [..., D]
// float32. Differentiable in h, w and b; the norm is frozen.
mx::array translate_norm(
    const mx::array& h,
    const std::optional<mx::array>& w,
    const std::optional<mx::array>& b,
    const std::string& norm,
    const std::optional<mx::array>& gain,
    const std::optional<mx::array>& norm_bias,
    float eps,
    const std::string& precision,
    mx::StreamOrDevice s = {});

}  // namespace metalens
