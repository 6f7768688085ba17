// Operations between the products of a model's forward pass: rotary positions, sums and products of rows, the gaussian activation.
#pragma once

#include "cpu/isa/rows.h"

namespace metalens::cpu::METALENS_ISA {

void add(const float* a, const float* b, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int lanes) { store_lanes(out + i, lanes, load_lanes(a + i, lanes, 0) + load_lanes(b + i, lanes, 0)); });
}

void multiply_elements(const float* a, const float* b, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int lanes) { store_lanes(out + i, lanes, load_lanes(a + i, lanes, 0) * load_lanes(b + i, lanes, 0)); });
}

void gelu_tanh(const float* x, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec v = load_lanes(x + i, lanes, 0);
    store_lanes(out + i, lanes, 0.5f * v * (1.0f + tanh_vec(0.7978845608028654f * (v + 0.044715f * v * v * v))));
  });
}

void rotate(const float* x, const float* cosines, const float* sines, int64_t half, bool pairs, float* out) {
  if (pairs) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cosines[i] - b * sines[i];
      out[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  for_vectors(half, [&](int64_t i, int lanes) {
    const vec a = load_lanes(x + i, lanes, 0), b = load_lanes(x + half + i, lanes, 0);
    const vec c = load_lanes(cosines + i, lanes, 0), s = load_lanes(sines + i, lanes, 0);
    store_lanes(out + i, lanes, a * c - b * s);
    store_lanes(out + half + i, lanes, b * c + a * s);
  });
}

}  // namespace metalens::cpu::METALENS_ISA
