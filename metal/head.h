// From the product U n to a logit: softcap(scale * (U n + bias)), -inf for rows of U that stand for no token.
#pragma once

#include "common.h"

namespace metalens {

// c tanh(t / c). Beyond 15 tanh is 1 in float32; some versions of it give NaN far out.
METAL_FUNC float softcapped(float t, float c) {
  return c == 0.0f || isnan(t) ? t : c * precise::tanh(clamp(t / c, -15.0f, 15.0f));
}

// The slope of the softcap where it gave z.
METAL_FUNC float softcap_slope(float z, float c) {
  return c == 0.0f ? 1.0f : 1.0f - (z / c) * (z / c);
}

}  // namespace metalens
