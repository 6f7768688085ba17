// The product of a matrix and its transpose.
#pragma once

#include <string>

#include "ops/common.h"

namespace metalens {

// x x^T [..., N, N] for x [..., N, K] of a float type, by its triangle on and below the diagonal, which is mirrored. Not differentiable.
mx::array gram(const mx::array& x, const std::string& precision, mx::StreamOrDevice s = {});

}  // namespace metalens
