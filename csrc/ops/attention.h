// Scaled dot-product attention on the CPU, as the frozen model's forward pass needs it.
#pragma once

#include <optional>
#include <string>

#include "ops/common.h"

namespace metalens {

// q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] floats, H a multiple of G; mask [T, S] added to the scaled products, or causal. Returns [B, H, T, E]
// in q's type. Not differentiable.
mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& mask,
    const std::string& precision,
    mx::StreamOrDevice s = {});

}  // namespace metalens
