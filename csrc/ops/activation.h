// The elementwise function between a model's two feed-forward products.
#pragma once

#include "ops/common.h"

namespace metalens {

// silu(gate) * x, computed in float32. Both have the same shape and float type, and so has the result. Not differentiable.
mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice s = {});

}  // namespace metalens
