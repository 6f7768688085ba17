// Operations on a row of logits between the two products, and on the rows of a model: softmax, differences, norms. Logits come one block of the
// vocabulary at a time; sums over blocks are kept in double.
#pragma once

#include "cpu/isa/vector.h"

namespace metalens::cpu::METALENS_ISA {

// Call f(i, lanes) for every vector of n elements; the last one may be short.
template <typename F>
inline void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) f(i, kVector);
  if (i < n) f(i, int(n - i));
}

inline vec load_lanes(const float* p, int lanes, float padding) {
  return lanes == kVector ? load_vec(p) : load_tail(p, lanes, padding);
}

inline void store_lanes(float* p, int lanes, vec v) {
  if (lanes == kVector) {
    store_vec(p, v);
  } else {
    store_tail(p, lanes, v);
  }
}

constexpr float kInfinity = __builtin_inff();

// The difference of logits d - shift, up to which g = p (exp(d - shift) - 1) is computed from p. Above it p may have underflowed to 0 where
// e = exp(lp + d - shift) has not, so e is computed directly. Below the floor exp(d - shift) is nothing beside 1.
constexpr float kDeltaFloor = -80.0f;
constexpr float kDeltaCeiling = 40.0f;

// Up to this distance of two log-probabilities, their terms in CompareSums come from exp(t) - 1 and series. Up to ln 2 / 2, exponential() has
// scale 1.
constexpr float kNearlyEqual = 0.34f;
// Beyond this distance the smaller probability is nothing beside the larger one.
constexpr float kFarApart = 80.0f;

// Up to this step (before the softcap, in units of the softcap) the addition theorem of tanh gives the more exact difference.
constexpr float kSmallStep = 0.5f;

void transform(float* z, const float* bias, int64_t n, float scale, float softcap) {
  if (!bias && scale == 1.0f && softcap == 0.0f) return;
  for_vectors(n, [&](int64_t i, int lanes) {
    vec v = load_lanes(z + i, lanes, 0);
    if (bias) v += load_lanes(bias + i, lanes, 0);
    v *= scale;
    if (softcap != 0.0f) v = softcap * tanh_vec(v / softcap);
    store_lanes(z + i, lanes, v);
  });
}

float softmax_add(const float* z, int64_t first, int64_t n, SoftmaxSums& sums, float* weights) {
  vec tops = splat(-kInfinity);
  for_vectors(n, [&](int64_t i, int lanes) { tops = max(tops, load_lanes(z + i, lanes, -kInfinity)); });
  float top = -kInfinity;
  for (int lane = 0; lane < kVector; ++lane) top = tops[lane] > top ? tops[lane] : top;
  float shrink = 1;
  if (top > sums.top) {
    for (int64_t i = 0; i < n; ++i) {
      if (z[i] == top) {
        sums.best = first + i;
        break;
      }
    }
    if (sums.top > -kInfinity) {
      const float fall = sums.top - top;
      shrink = exp_vec(splat(fall))[0];
      sums.moment = shrink * (sums.moment + double(fall) * sums.sum);
      sums.sum *= shrink;
    }
    sums.top = top;
  }
  // If all logits so far are -inf, the reference is 0, and they weigh nothing.
  const float reference = sums.top > -kInfinity ? sums.top : 0;
  vec sum{}, moment{};
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec t = load_lanes(z + i, lanes, -kInfinity) - reference;
    const vec e = exp_vec(t);
    sum += e;
    moment += e == 0.0f ? e : e * t;
    if (weights) store_lanes(weights + i, lanes, e);
  });
  sums.sum += double(sum_of(sum));
  sums.moment += double(sum_of(moment));
  return shrink;
}

double weighted_difference(const float* weights, const float* a, const float* b, int64_t n) {
  vec sum{};
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec p = load_lanes(weights + i, lanes, 0);
    const vec difference = load_lanes(a + i, lanes, 0) - load_lanes(b + i, lanes, 0);
    sum += p == 0.0f ? p : p * difference;
  });
  return double(sum_of(sum));
}

// The Jensen-Shannon term is (p + q) g. With s = |log(q / p)| / 2 and u = tanh(s) = |p - q| / (p + q),
//   g = s u - log cosh(s) = u^2 / 2 + u^4 / 12 + u^6 / 30 + ... = log 2 - log(1 + w) - s (1 - u),  w = min(p, q) / max(p, q).
void compare_add(const float* a, const float* b, int64_t n, float lse_a, float lse_b, CompareSums& sums) {
  vec forward{}, reverse{}, shannon{}, variation{};
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec log_p = load_lanes(a + i, lanes, -kInfinity) - lse_a, log_q = load_lanes(b + i, lanes, -kInfinity) - lse_b;
    const vec p = exp_vec(log_p), q = exp_vec(log_q), t = log_q - log_p, mass = p + q, zero{};
    const vec distance = t < 0.0f ? -t : t;
    const ivec near = distance < kNearlyEqual;
    const Exponential e = exponential(near ? t : zero);
    const vec difference = near ? p * e.growth : q - p, size = difference < 0.0f ? -difference : difference;
    const vec curve = p * e.curve;
    // Where a probability is 0, its logarithm does not count.
    const vec kl = near ? curve : p == 0.0f ? q : difference - p * t;
    const vec back = near ? difference * t - curve : q == 0.0f ? p : q * t - difference;

    const vec smaller = p < q ? p : q, larger = p < q ? q : p, share = 1.0f / mass;
    const vec u2 = (size * share) * (size * share);
    vec series = splat(1.0f / 45);
    series = series * u2 + 1.0f / 28;
    series = series * u2 + 1.0f / 15;
    series = series * u2 + 1.0f / 6;
    series = (series * u2 + 1.0f) * u2 * 0.5f;
    // log(1 + w) = 2 atanh(r)
    const vec r = smaller / (larger + larger + smaller), r2 = r * r;
    vec atanh = splat(1.0f / 11);
    atanh = atanh * r2 + 1.0f / 9;
    atanh = atanh * r2 + 1.0f / 7;
    atanh = atanh * r2 + 1.0f / 5;
    atanh = atanh * r2 + 1.0f / 3;
    atanh = (atanh * r2 + 1.0f) * r;
    const vec bounded = distance > kFarApart ? splat(kFarApart) : distance;
    const vec direct = 0.693147181f - (atanh + atanh) - bounded * smaller * share;
    const vec js = mass * (near ? series : direct);

    const ivec gone = mass == 0.0f;  // ruled out by both
    forward += gone ? zero : kl;
    reverse += gone ? zero : back;
    shannon += gone ? zero : js;
    variation += gone ? zero : size;
  });
  sums.kl += double(sum_of(forward));
  sums.reverse_kl += double(sum_of(reverse));
  sums.js += double(sum_of(shannon));
  sums.difference += double(sum_of(variation));
}

int64_t count_above(const float* z, int64_t n, float bound) {
  ivec above{};
  for_vectors(n, [&](int64_t i, int lanes) { above -= load_lanes(z + i, lanes, -kInfinity) > bound; });
  int64_t total = 0;
  for (int lane = 0; lane < kVector; ++lane) total += above[lane];
  return total;
}

void log_probabilities(float* z, float lse, int64_t n, float* p) {
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec lp = load_lanes(z + i, lanes, -kInfinity) - lse;
    store_lanes(z + i, lanes, lp);
    store_lanes(p + i, lanes, exp_vec(lp));
  });
}

void delta_transform(float* d, const float* model, int64_t n, float scale, float softcap, float* slope) {
  if (softcap == 0.0f) {
    if (scale == 1.0f) return;
    return for_vectors(n, [&](int64_t i, int lanes) { store_lanes(d + i, lanes, load_lanes(d + i, lanes, 0) * scale); });
  }
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec before = load_lanes(model + i, lanes, 0) / softcap, step = load_lanes(d + i, lanes, 0) * (scale / softcap);
    const Hyperbolic a = hyperbolic(before), lens = hyperbolic(before + step);
    // With b = tanh(step), tanh(before + step) - a = b (1 - a^2) / (1 + a b). That is exact for small steps, and the plain difference for large ones.
    const vec b = tanh_vec(step);
    const vec change = (step < 0.0f ? -step : step) < kSmallStep ? b * a.slope / (1.0f + a.tanh * b) : lens.tanh - a.tanh;
    store_lanes(d + i, lanes, softcap * change);
    store_lanes(slope + i, lanes, lens.slope);
  });
}

void delta_add(float* d, const float* lp, const float* p, const float* slope, int64_t n, float shift, DeltaSums& sums) {
  vec excess{}, curvature{}, linear{};
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec t = load_lanes(d + i, lanes, 0) - shift;
    const vec weight = load_lanes(p + i, lanes, 0);
    const vec floor = splat(kDeltaFloor), ceiling = splat(kDeltaCeiling);
    const vec inside = t < floor ? floor : t > ceiling ? ceiling : t;
    const Exponential e = exponential(inside);
    // exp(t) - 1 and exp(t) - 1 - t keep full precision where t is tiny, that is, where q is nearly p.
    const vec rise = e.scale * e.growth + (e.scale - 1.0f);
    vec g = weight * rise;
    vec bend = weight * (e.scale == 1.0f ? e.curve : rise - t);
    if (any(t > ceiling)) [[unlikely]] {
      // Compute e directly (see kDeltaCeiling), and record the largest exponent.
      const vec log_e = t > ceiling ? load_lanes(lp + i, lanes, -kInfinity) + t : splat(-kInfinity);
      for (int lane = 0; lane < lanes; ++lane) sums.top = log_e[lane] > sums.top ? log_e[lane] : sums.top;
      const vec bound = splat(kExpCeiling);
      const vec direct = exp_vec(log_e > bound ? bound : log_e) - weight;
      g = t > ceiling ? (log_e > bound ? splat(kInfinity) : direct) : g;
      bend = t > ceiling ? g - weight * t : bend;
    }
    excess += g;
    curvature += bend;
    linear += weight == 0.0f ? weight : weight * t;
    if (slope) g *= load_lanes(slope + i, lanes, 0);
    store_lanes(d + i, lanes, g);
  });
  sums.excess += double(sum_of(excess));
  sums.curvature += double(sum_of(curvature));
  sums.linear += double(sum_of(linear));
}

void swiglu(const float* gate, const float* x, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int lanes) {
    const vec g = load_lanes(gate + i, lanes, 0), bound = splat(kExpCeiling);
    const vec e = exp_vec(-g > bound ? bound : -g);
    store_lanes(out + i, lanes, g / (1.0f + e) * load_lanes(x + i, lanes, 0));
  });
}

// n = norm(y): RMSNorm gain * y / rms(y) or, with `center`, LayerNorm. gain and bias may be null. Returns the mean and 1 / rms that it used.
RowMoments normalize(const float* y, const float* gain, const float* bias, int64_t d, float eps, bool center, float* n) {
  vec total{};
  if (center) for_vectors(d, [&](int64_t i, int lanes) { total += load_lanes(y + i, lanes, 0); });
  const float mean = sum_of(total) / float(d);
  vec squares{};
  for_vectors(d, [&](int64_t i, int lanes) {
    const vec c = load_lanes(y + i, lanes, mean) - mean;
    squares += c * c;
  });
  const float inverse = 1.0f / __builtin_sqrtf(sum_of(squares) / float(d) + eps);
  for_vectors(d, [&](int64_t i, int lanes) {
    vec v = (load_lanes(y + i, lanes, 0) - mean) * inverse;
    if (gain) v *= load_lanes(gain + i, lanes, 0);
    if (bias) v += load_lanes(bias + i, lanes, 0);
    store_lanes(n + i, lanes, v);
  });
  return {mean, inverse};
}

// dy from dn: with x = (y - mean) * inverse and u = gain * dn, dy = inverse * (u - x mean(x u)), less the mean of u if centered.
void normalize_backward(const float* y, const float* gain, const float* dn, int64_t d, RowMoments moments, bool center, float* dy) {
  vec along{}, total{};
  const auto scaled = [&](int64_t i, int lanes) {
    const vec g = load_lanes(dn + i, lanes, 0);
    return gain ? g * load_lanes(gain + i, lanes, 0) : g;
  };
  const auto standard = [&](int64_t i, int lanes) { return (load_lanes(y + i, lanes, moments.mean) - moments.mean) * moments.inverse; };
  for_vectors(d, [&](int64_t i, int lanes) {
    const vec u = scaled(i, lanes);
    along += standard(i, lanes) * u;
    if (center) total += u;
  });
  const float projection = sum_of(along) / float(d), mean = sum_of(total) / float(d);
  for_vectors(
      d, [&](int64_t i, int lanes) { store_lanes(dy + i, lanes, (scaled(i, lanes) - mean - standard(i, lanes) * projection) * moments.inverse); });
}

}  // namespace metalens::cpu::METALENS_ISA
