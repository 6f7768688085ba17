"""translate_norm: values and gradients of norm(W h + b) against float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import _ext
from metalens.models.unembed import norm_of
from metalens.ops import Norm, translate_norm
from support import oracle

# Relative to the largest element: float32 sums of `width` products, and a norm that divides by their root mean square.
TOLERANCE = 2e-5


class Exact:
    """Compute norm(W h + b) in float64, and its gradients for a gradient g at the result."""

    def __init__(self, norm):
        self.kind, self.eps = norm.kind, norm.eps
        self.gain = 1.0 if norm.weight is None else oracle.wide(norm.weight)
        self.bias = 0.0 if norm.bias is None else oracle.wide(norm.bias)

    def standard(self, y):
        if self.kind == "none":
            return y, 1.0
        if self.kind == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + self.eps)
        return y * inverse, inverse

    def __call__(self, h, w, b):
        return self.standard(h @ w.T + b)[0] * self.gain + self.bias

    def pulled_back(self, h, w, b, g):
        """Return the gradients of sum(g * result) at h, W and b."""
        x, inverse = self.standard(h @ w.T + b)
        u = g * self.gain
        if self.kind != "none":
            u = u - x * np.mean(x * u, axis=-1, keepdims=True)
        if self.kind == "layer":
            u = u - u.mean(axis=-1, keepdims=True)
        dy = (u * inverse).reshape(-1, h.shape[-1])
        return (dy @ w).reshape(h.shape), dy.T @ h.reshape(-1, h.shape[-1]), dy.sum(axis=0)


def make_norm(rng, kind, width, with_weight=True, with_bias=True, eps=1e-5):
    if kind == "none":
        return Norm(lambda h: h, "none")
    if kind == "rms":
        module = nn.RMSNorm(width, eps)
        module.weight = 1 + oracle.random_array(rng, width, scale=0.3)
    else:
        module = nn.LayerNorm(width, eps, affine=with_weight, bias=with_bias)
        if with_weight:
            module.weight = 1 + oracle.random_array(rng, width, scale=0.3)
            if with_bias:
                module.bias = oracle.random_array(rng, width, scale=0.3)
    return norm_of(module)


NORMS = {
    "rms": {"kind": "rms"},
    "layer": {"kind": "layer"},
    "layer without bias": {"kind": "layer", "with_bias": False},
    "layer without parameters": {"kind": "layer", "with_weight": False},
    "none": {"kind": "none"},
}


def translator(rng, width):
    """Make a translator away from the identity."""
    return mx.eye(width) + oracle.random_array(rng, width, width, scale=0.5 / width**0.5), oracle.random_array(rng, width, scale=0.2)


def assert_close(ours, expected, tolerance=TOLERANCE):
    assert ours.shape == expected.shape
    assert np.abs(oracle.wide(ours) - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def assert_expected(rng, norm, h, w, b, tolerance=TOLERANCE):
    """Compare the value and all three gradients."""
    exact, arrays = Exact(norm), [oracle.wide(a) for a in (h, w, b)]
    g = oracle.random_array(rng, *h.shape)
    (n,), gradients = mx.vjp(lambda h, w, b: translate_norm(h, w, b, norm), [h, w, b], [g])
    assert n.dtype == mx.float32
    assert_close(n, exact(*arrays), tolerance)
    for argument, ours, expected in zip((h, w, b), gradients, exact.pulled_back(*arrays, oracle.wide(g)), strict=True):
        assert ours.dtype == argument.dtype
        assert_close(ours, expected, max(tolerance, 2 * oracle.EPSILON[argument.dtype]))


def test_the_oracle_s_gradient_is_a_finite_difference(rng):
    for settings in NORMS.values():
        exact = Exact(make_norm(rng, width=7, **settings))
        h, w, b, g = (rng.standard_normal(shape) for shape in ((3, 7), (7, 7), (7,), (3, 7)))
        for values, expected in zip((h, w, b), exact.pulled_back(h, w, b, g), strict=True):
            for index in (tuple(rng.integers(0, size) for size in values.shape) for _ in range(4)):
                slope = oracle.central_difference(lambda: np.sum(g * exact(h, w, b)), values, index)  # noqa: B023
                assert expected[index] == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("width", [1, 2, 7, 31, 33, 64, 257])
@pytest.mark.parametrize("settings", NORMS.values(), ids=NORMS)
def test_values_and_gradients(rng, each_backend, settings, width):
    norm = make_norm(rng, width=width, **settings)
    # Of one column, an RMSNorm is the sign and a LayerNorm its bias; of two columns, a LayerNorm is the sign: gradients there are rounding errors.
    for rows in (1, 5):
        h = oracle.random_array(rng, rows, width)
        if width <= {"none": 0, "rms": 1, "layer": 2}[settings["kind"]]:
            w, b = translator(rng, width)
            assert_close(translate_norm(h, w, b, norm), Exact(norm)(*(oracle.wide(a) for a in (h, w, b))), 1e-3)
        else:
            assert_expected(rng, norm, h, *translator(rng, width))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (200, 8)])
def test_any_number_of_leading_axes(rng, each_backend, shape):
    assert_expected(rng, make_norm(rng, "rms", 8), oracle.random_array(rng, *shape), *translator(rng, 8))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("settings", NORMS.values(), ids=NORMS)
def test_rows_of_16_bits_are_widened(rng, each_backend, settings, dtype):
    assert_expected(rng, make_norm(rng, width=64, **settings), oracle.random_array(rng, 5, 64, dtype=dtype), *translator(rng, 64))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_a_translator_of_16_bits(rng, each_backend, dtype):
    w, b = (a.astype(dtype) for a in translator(rng, 64))
    assert_expected(rng, make_norm(rng, "rms", 64), oracle.random_array(rng, 5, 64), w, b)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_eps(rng, each_backend, kind, eps):
    assert_expected(rng, make_norm(rng, kind, 64, eps=eps), oracle.random_array(rng, 5, 64), *translator(rng, 64))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_small_and_large_rows(rng, each_backend, kind, scale):
    w, b = translator(rng, 64)
    assert_expected(rng, make_norm(rng, kind, 64), oracle.random_array(rng, 5, 64, scale=scale), w, b * scale)


@pytest.mark.parametrize("settings", NORMS.values(), ids=NORMS)
def test_rows_of_zeros_stay_finite(rng, each_backend, settings):
    norm = make_norm(rng, width=64, **settings)
    h = oracle.random_array(rng, 3, 64)
    h[1] = 0
    assert_expected(rng, norm, h, mx.eye(64), mx.zeros(64))


def test_a_layer_norm_of_rows_far_from_zero(rng, each_backend):
    # The mean is a thousand times the deviation: the kernel must square the deviations, not the rows.
    h = oracle.random_array(rng, 5, 64) + 1000
    exact = Exact(norm := make_norm(rng, "layer", 64))
    expected = exact(oracle.wide(h), np.eye(64), np.zeros(64))
    assert np.abs(oracle.wide(translate_norm(h, mx.eye(64), mx.zeros(64), norm)) - expected).max() < 1e-3  # 1000 has steps of 6e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_row_stays_alone(rng, each_backend, bad):
    h, (w, b), norm = oracle.random_array(rng, 5, 64), translator(rng, 64), make_norm(rng, "rms", 64)
    h[2, 9] = bad
    n = oracle.wide(translate_norm(h, w, b, norm))
    assert not np.isfinite(n[2]).any() or not np.isnan(bad)
    kept = [0, 1, 3, 4]
    assert_close(mx.array(n[kept].astype(np.float32)), Exact(norm)(oracle.wide(h)[kept], oracle.wide(w), oracle.wide(b)))


def test_a_norm_of_unknown_kind_is_run_as_it_is(rng, each_backend):
    h, (w, b) = oracle.random_array(rng, 5, 64), translator(rng, 64)
    norm = Norm(lambda y: mx.tanh(y) * 3)
    y = oracle.wide(h) @ oracle.wide(w).T + oracle.wide(b)
    n, slope = mx.value_and_grad(lambda h: mx.sum(translate_norm(h, w, b, norm)))(h)
    assert n.item() == pytest.approx(3 * np.tanh(y).sum(), abs=1e-4)
    assert_close(slope, 3 * (1 - np.tanh(y) ** 2) @ oracle.wide(w))


def test_known_norms_run_natively_and_others_do_not(rng, native, monkeypatch):
    calls = []
    monkeypatch.setattr(_ext, "translate_norm", lambda *args, kept=_ext.translate_norm: (calls.append(args[3]), kept(*args))[1])
    h, (w, b) = oracle.random_array(rng, 5, 64), translator(rng, 64)
    for kind in ("rms", "layer", "none"):
        translate_norm(h, w, b, make_norm(rng, kind, 64))
    translate_norm(h, w, b, Norm(mx.tanh))
    assert calls == ["rms", "layer", "none"]


def test_the_norm_s_own_parameters_are_frozen(rng, each_backend):
    h, (w, b) = oracle.random_array(rng, 5, 64), translator(rng, 64)

    def total(gain):
        return mx.sum(translate_norm(h, w, b, Norm(lambda y: mx.fast.rms_norm(y, gain, 1e-5), "rms", gain, None, 1e-5)))

    assert not np.any(oracle.wide(mx.grad(total)(mx.ones(64))))


def test_views_and_compile_and_streams(rng, cpu_backend):
    h, (w, b), norm = oracle.random_array(rng, 6, 64), translator(rng, 64), make_norm(rng, "layer", 64)
    expected = Exact(norm)(*(oracle.wide(a) for a in (h, w, b)))
    turned = (mx.contiguous(h.T).T, mx.contiguous(w.T).T, mx.repeat(b, 2)[::2])
    assert_close(translate_norm(*turned, norm), expected)
    compiled = mx.compile(lambda *arrays: translate_norm(*arrays, norm) + 0)
    for rows in (6, 2, 6):
        assert_close(compiled(h[:rows], w, b), expected[:rows])
    with mx.stream(mx.new_stream(mx.cpu)):
        n = translate_norm(h, w, b, norm)
    assert_close(n + 0, expected)
    broadcast = mx.broadcast_to(h[:1], (4, 64))
    assert_close(translate_norm(broadcast, w, b, norm), np.broadcast_to(expected[:1], (4, 64)))


def test_no_rows(rng, each_backend):
    n = translate_norm(mx.zeros((0, 64)), *translator(rng, 64), make_norm(rng, "rms", 64))
    mx.eval(n)
    assert n.shape == (0, 64)


class Scaled(nn.RMSNorm):
    """A norm of a known family with its own `__call__`, which no weight can reproduce."""

    def __call__(self, h):
        return super().__call__(h) * 2 + 1


class Named(nn.LayerNorm):
    """A norm that is recognized by its results."""


def test_norm_of_recognizes_mlx_s_own_norms_exactly(rng):
    rms, layer, bare = nn.RMSNorm(8, 1e-3), nn.LayerNorm(8, 1e-4), nn.LayerNorm(8, affine=False)
    assert (norm_of(rms).kind, norm_of(rms).eps, norm_of(rms).bias) == ("rms", 1e-3, None)
    assert mx.array_equal(norm_of(rms).weight, rms.weight)
    assert (norm_of(layer).kind, norm_of(layer).eps) == ("layer", 1e-4)
    assert mx.array_equal(norm_of(layer).bias, layer.bias)
    assert (norm_of(bare).kind, norm_of(bare).weight, norm_of(bare).bias) == ("layer", None, None)
    h = oracle.random_array(rng, 3, 8)
    for module in (rms, layer, bare, Scaled(8), Named(8), nn.GroupNorm(2, 8), nn.Identity()):
        assert mx.array_equal(norm_of(module)(h), module(h))


def test_norm_of_recognizes_a_norm_under_another_name():
    assert (norm_of(Named(8, 1e-4)).kind, norm_of(Named(8, 1e-4)).eps) == ("layer", 1e-4)


@pytest.mark.parametrize("module", [Scaled(8), nn.GroupNorm(2, 8), nn.Identity()], ids=lambda m: type(m).__name__)
def test_norm_of_leaves_other_norms_to_themselves(rng, each_backend, module):
    norm = norm_of(module)
    assert (norm.kind, norm.weight, norm.bias) == (None, None, None)
    h, (w, b) = oracle.random_array(rng, 3, 8), translator(rng, 8)
    np.testing.assert_allclose(oracle.wide(translate_norm(h, w, b, norm)), oracle.wide(module(h @ w.T + b)), atol=1e-5)
