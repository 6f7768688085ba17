// Products of matrices whose result is known to be symmetric.
#pragma once

#include <string>

#include "ops/common.h"

namespace metalens {

// a b^T [..., N, N] for a and b [..., N, K] of one float type, by its triangle on and below the diagonal, which is mirrored. Not differentiable.
mx::array symmetric_product(const mx::array& a, const mx::array& b, const std::string& precision, mx::StreamOrDevice s = {});

}  // namespace metalens
