"""attention and swiglu: the operations of a frozen model between its products."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import _ext
from metalens.ops import attention, swiglu, use_backend
from support import oracle

EPSILON = {mx.float32: 3e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}  # for values of size 1: float32 sums, then one rounding to the type

# (batch, heads, heads of keys, queries, keys, width, width of values): one of each; shared keys; more queries than a task has, more keys than a block
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 7, 7, 8, 8), (1, 3, 3, 5, 9, 16, 4), (1, 6, 2, 67, 300, 24, 24), (2, 2, 1, 130, 130, 5, 7)]


def make(rng, shape, dtype=mx.float32):
    b, h, g, t, s, d, e = shape
    return tuple(oracle.random_array(rng, *dims, dtype=dtype) for dims in ((b, h, t, d), (b, g, s, d), (b, g, s, e)))


def expected(q, k, v, scale, mask=None):
    """Compute attention in float64; mask [..., T, S] is added."""
    q, k, v = map(oracle.wide, (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    z = scale * q @ np.repeat(k, repeats, axis=1).swapaxes(-1, -2)
    return oracle.softmax(z if mask is None else z + mask) @ np.repeat(v, repeats, axis=1)


def causal(queries, keys):
    return np.where(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries, 0.0, -np.inf)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", ["none", "causal", "numbers", "booleans"])
def test_values(rng, cpu_backend, shape, dtype, masked):
    q, k, v = make(rng, shape, dtype)
    t, s = shape[3:5]
    added = rng.standard_normal((t, s)).astype(np.float32)
    allowed = rng.random((t, s)) < 0.6
    allowed[:, 0] = True
    mask, to_add = {
        "none": (None, None),
        "causal": ("causal", causal(t, s)),
        "numbers": (mx.array(added).astype(dtype), added),
        "booleans": (mx.array(allowed)[None, None], np.where(allowed, 0, -np.inf)),
    }[masked]
    y = attention(q, k, v, scale=0.3, mask=mask)
    assert y.dtype == dtype
    # In 16 bits plain MLX rounds between its operations, and rounds the numbers of a mask.
    loose = (3 if cpu_backend == "reference" else 1) * (2 if masked == "numbers" else 1)
    np.testing.assert_allclose(oracle.wide(y), expected(q, k, v, 0.3, to_add), atol=loose * EPSILON[dtype])


def test_masks_of_each_head_and_sinks_are_left_to_plain_mlx(rng, native):
    q, k, v = make(rng, (2, 4, 2, 6, 6, 8, 8))
    mask = oracle.random_array(rng, 2, 4, 6, 6)
    for settings in ({"mask": mask}, {"mask": "causal", "sinks": mx.zeros(4)}):
        ours, plain = attention(q, k, v, scale=0.3, **settings), mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, **settings)
        assert mx.array_equal(ours, plain)


def test_a_query_with_nan_leaves_the_others_alone(rng, native):
    q, k, v = make(rng, (1, 2, 1, 9, 9, 8, 8))
    q[0, 1, 4] = mx.nan
    y = np.array(attention(q, k, v, scale=0.3, mask="causal"))
    assert np.argwhere(np.isnan(y).any(axis=-1)).tolist() == [[0, 1, 4]]


def test_large_products_do_not_overflow(rng, cpu_backend):
    q, k, v = make(rng, (1, 2, 2, 5, 300, 8, 8))
    np.testing.assert_allclose(oracle.wide(attention(1e3 * q, k, v, scale=10.0)), expected(1e3 * q, k, v, 10.0), atol=2e-2)


def test_the_gradient_is_plain_mlx_s(rng):
    arrays = make(rng, (1, 4, 2, 9, 9, 8, 8))

    def loss(q, k, v):
        return mx.sum(mx.square(attention(q, k, v, scale=0.3, mask="causal")))

    with use_backend("native"):
        ours = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    with use_backend("reference"):
        plain = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)


def test_compiled(rng, native):
    q, k, v = make(rng, (1, 2, 1, 9, 9, 8, 8))
    compiled = mx.compile(lambda q, k, v: attention(q, k, v, scale=0.3, mask="causal"))
    assert mx.array_equal(compiled(q, k, v), attention(q, k, v, scale=0.3, mask="causal"))


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)), {}),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {}),
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), {}),
        (((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"causal": True}),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"mask": mx.zeros((2, 3))}),
        (((1, 2, 3, 4), (1, 0, 3, 4), (1, 0, 3, 4)), {}),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_extension(shapes, settings):
    with pytest.raises(ValueError, match=r"\[metalens\]"):
        _ext.attention(*(mx.zeros(shape) for shape in shapes), 1.0, **settings)


def test_no_queries():
    assert _ext.attention(mx.zeros((1, 2, 0, 4)), mx.zeros((1, 2, 3, 4)), mx.zeros((1, 2, 3, 4)), 1.0).shape == (1, 2, 0, 4)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 5), (3, 40000)])
def test_swiglu(rng, cpu_backend, shape, dtype):
    gate, x = oracle.random_array(rng, *shape, dtype=dtype, scale=4.0), oracle.random_array(rng, *shape, dtype=dtype)
    y = swiglu(gate, x)
    assert y.dtype == dtype
    g = oracle.wide(gate)
    exact = g / (1 + np.exp(-g)) * oracle.wide(x)
    np.testing.assert_allclose(oracle.wide(y), exact, atol=1e-6 + 40 * (EPSILON[dtype] - 3e-6), rtol=1e-6)


def test_swiglu_at_the_ends_of_its_range(native):
    gate = mx.array([-mx.inf, -1e4, -88.0, 0.0, 88.0, 1e4, mx.inf, mx.nan])
    y = np.array(swiglu(gate, mx.ones(8)))
    np.testing.assert_allclose(y[1:7], [0, 0, 0, 88, 1e4, np.inf], atol=1e-30)
    assert np.isnan(y[7])


def test_the_gradient_of_swiglu(rng, native):
    gate, x = oracle.random_array(rng, 5, 7), oracle.random_array(rng, 5, 7)
    ours = mx.grad(lambda g, x: mx.sum(swiglu(g, x)), argnums=(0, 1))(gate, x)
    plain = mx.grad(lambda g, x: mx.sum(nn.silu(g) * x), argnums=(0, 1))(gate, x)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-6)
