// The comparison of two sets of rows, each through its own unembedding.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/head.h"

namespace metalens {

// {KL(a || b), KL(b || a), Jensen-Shannon divergence, total variation}, each [L, N], of rows a [L, N, D] and b [L or 1, N, D of its head]. The
// log-sum-exp lse_a [L, N] and lse_b [L or 1, N] are results of lens_target. Without head_b, both go through `head`. Not differentiable.
std::vector<mx::array> lens_compare(
    const mx::array& a,
    const Head& head,
    const mx::array& lse_a,
    const mx::array& b,
    const mx::array& lse_b,
    const Head* head_b,
    const std::string& precision,
    mx::StreamOrDevice s = {});

}  // namespace metalens
