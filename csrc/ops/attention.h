// Scaled dot-product attention on the CPU, as the frozen model's forward pass needs it.
#pragma once

#include <optional>
#include <string>

#include "ops/common.h"

namespace metalens {

// q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] floats, H a multiple of G. The mask broadcasts to [B, H, T, S]: booleans, true = visible, or floats
// that are added to the scaled products; `causal` excludes it. sinks [H] are logits of one more key, whose value is zero. Returns [B, H, T, E] in q's
// type, which lies in memory as [B, T, H, E]. Gradient of plain MLX.
mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    bool causal,
    const std::optional<mx::array>& mask,
    const std::optional<mx::array>& sinks,
    const std::string& precision,
    mx::StreamOrDevice s = {});

}  // namespace metalens
