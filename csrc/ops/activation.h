// The elementwise function between a model's two feed-forward products.
#pragma once

#include "ops/common.h"

namespace metalens {

// silu(gate) * x, of equal shapes and one float type, which the result has too; computed in float32. Not differentiable.
mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice s = {});

}  // namespace metalens
