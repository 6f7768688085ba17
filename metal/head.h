// From the product U n to a logit: softcap(scale * (U n + bias)) + offset, and -inf for rows of U that are not tokens.
#pragma once

#include "common.h"

namespace metalens {

// c tanh(t / c). Beyond 15 tanh is 1 in float32; for much larger arguments some implementations give NaN, so the argument is clamped.
METAL_FUNC float softcapped(float t, float c) {
  return c == 0.0f || isnan(t) ? t : c * precise::tanh(clamp(t / c, -15.0f, 15.0f));
}

// The slope of the softcap at the logit whose capped value is z.
METAL_FUNC float softcap_slope(float z, float c) {
  return c == 0.0f ? 1.0f : 1.0f - (z / c) * (z / c);
}

}  // namespace metalens
