// The direction of a step of Muon for one matrix.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/common.h"

namespace metalens {

// [V, P, slopes [2]] as in cpu/muon.h, float32, for a gradient and a momentum [N, K], row_scale [N] and column_scale [K]. Not differentiable.
std::vector<mx::array> muon_direction(
    const mx::array& gradient,
    const mx::array& momentum,
    float beta,
    const std::vector<std::vector<float>>& polynomials,
    float slack,
    const std::optional<mx::array>& row_scale,
    const std::optional<mx::array>& column_scale,
    const std::string& precision,
    mx::StreamOrDevice s = {});

}  // namespace metalens
