"""attention: values in float64, masks, sinks, gradients."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import _ext
from metalens.ops import attention, use_backend
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


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 4, 1, 300), (2, 1, 130, 300), (2, 4, 130, 300), (300,)], ids=str)
@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_of_each_head_and_sequence(rng, cpu_backend, shape, boolean, dtype):
    q, k, v = make(rng, (2, 4, 2, 130, 300, 8, 8), dtype)
    numbers = rng.random(shape) if boolean else rng.standard_normal(shape).astype(np.float32)
    visible = numbers < 0.8
    if boolean and shape[-1] > 1:
        visible[..., 0] = True  # else a query may see nothing
    elif boolean:
        visible[:] = True
    mask = mx.array(visible) if boolean else mx.array(numbers).astype(dtype)
    y = attention(q, k, v, scale=0.3, mask=mask)
    loose = (3 if cpu_backend == "reference" else 1) * (1 if boolean else 2)
    exact = expected(q, k, v, 0.3, np.where(visible, 0, -np.inf) if boolean else oracle.wide(mask))
    np.testing.assert_allclose(oracle.wide(y), exact, atol=loose * EPSILON[dtype])


@pytest.mark.parametrize("window", [1, 3, 40, 256, 1000])
def test_a_sliding_window(rng, cpu_backend, window):
    """Whole blocks of keys are hidden from all queries of a task."""
    q, k, v = make(rng, (1, 2, 1, 600, 600, 4, 4))
    distance = np.arange(600)[:, None] - np.arange(600)
    visible = (distance >= 0) & (distance < window)
    y = attention(q, k, v, scale=0.3, mask=mx.array(visible))
    np.testing.assert_allclose(oracle.wide(y), expected(q, k, v, 0.3, np.where(visible, 0, -np.inf)), atol=EPSILON[mx.float32])


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("masked", ["none", "causal", "window"])
def test_sinks(rng, cpu_backend, masked, dtype):
    q, k, v = make(rng, (2, 4, 2, 67, 67, 8, 8), dtype)
    sinks = mx.array([-mx.inf, -2.0, 0.5, 30.0]).astype(dtype)
    visible = np.abs(np.arange(67)[:, None] - np.arange(67)) < 3
    mask, added = {"none": (None, None), "causal": ("causal", causal(67, 67)), "window": (mx.array(visible), np.where(visible, 0, -np.inf))}[masked]
    z = 0.3 * oracle.wide(q) @ np.repeat(oracle.wide(k), 2, axis=1).swapaxes(-1, -2) + (0 if added is None else added)
    p = oracle.softmax(np.concatenate([z, np.broadcast_to(oracle.wide(sinks)[:, None, None], (2, 4, 67, 1))], axis=-1))[..., :-1]
    y = attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)
    np.testing.assert_allclose(
        oracle.wide(y), p @ np.repeat(oracle.wide(v), 2, axis=1), atol=(3 if cpu_backend == "reference" else 1) * EPSILON[dtype]
    )


def test_arrays_with_any_strides(rng, native):
    """A model passes views: heads are split and exchanged with tokens, and some share their keys."""
    packed = oracle.random_array(rng, 2, 9, 4, 24)
    q, k, v = (part.transpose(0, 2, 1, 3) for part in mx.split(packed, 3, axis=-1))
    one_head = mx.broadcast_to(k[:, :1], k.shape)
    y = attention(q[..., ::2], one_head[..., ::2], v[:, :, ::-1], scale=0.3, mask="causal")
    copies = (mx.array(np.array(a)) for a in (q[..., ::2], one_head[..., ::2], v[:, :, ::-1]))
    assert mx.array_equal(y, attention(*copies, scale=0.3, mask="causal"))


def test_maps_over_sequences(rng, native):
    q, k, v = make(rng, (3, 4, 2, 6, 6, 8, 8))
    each = mx.vmap(lambda q, k, v: attention(q[None], k[None], v[None], scale=0.3, mask="causal")[0])(q, k, v)
    np.testing.assert_allclose(np.array(each), np.array(attention(q, k, v, scale=0.3, mask="causal")), atol=EPSILON[mx.float32])


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
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"mask": mx.zeros((1, 1, 1, 3, 3))}),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"mask": mx.zeros((3, 3), dtype=mx.int32)}),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"mask": mx.zeros((3, 3)), "causal": True}),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {"sinks": mx.zeros(3)}),
        (((1, 2, 3, 4), (1, 0, 3, 4), (1, 0, 3, 4)), {}),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_extension(shapes, settings):
    with pytest.raises(ValueError, match=r"\[metalens\]"):
        _ext.attention(*(mx.zeros(shape) for shape in shapes), 1.0, **settings)


def test_no_queries():
    assert _ext.attention(mx.zeros((1, 2, 0, 4)), mx.zeros((1, 2, 3, 4)), mx.zeros((1, 2, 3, 4)), 1.0).shape == (1, 2, 0, 4)
