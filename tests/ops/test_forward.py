"""The operations of a frozen model between its products, but attention: norms, rotary positions, activations, sums."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import _ext
from metalens.ops import gelu_approx, layer_norm, rms_norm, rope, swiglu, use_backend
from metalens.ops.sums import run_sums_natively
from support import oracle

EPSILON = {mx.float32: 3e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}  # for values of size 1: float32 sums, then one rounding to the type
SHAPES = [(1, 1), (7, 5), (2, 3, 17), (1, 64), (130, 33), (3, 5000)]


def gradients(function, *arrays):
    """Return the gradients of the sum of squares of a function, on both backends."""
    for backend in ("native", "reference"):
        with use_backend(backend):
            yield mx.grad(lambda *a: mx.sum(mx.square(function(*a))), argnums=tuple(range(len(arrays))))(*arrays)


def assert_same_gradients(function, *arrays):
    ours, plain = gradients(function, *arrays)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- norms


def exact_norm(x, weight, bias, eps, center):
    x = oracle.wide(x)
    x = x - x.mean(-1, keepdims=True) if center else x
    y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
    return y * (1 if weight is None else oracle.wide(weight)) + (0 if bias is None else oracle.wide(bias))


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parameters", [0, 1, 2])
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_norms(rng, cpu_backend, shape, dtype, parameters, center):
    x = oracle.random_array(rng, *shape, dtype=dtype, scale=3.0)
    weight, bias = (oracle.random_array(rng, shape[-1], dtype=dtype) if given < parameters else None for given in range(2))
    if center:
        y = layer_norm(x, weight, bias, 1e-5)
    else:
        y, bias = rms_norm(x, weight, 1e-5), None
    assert y.dtype == dtype
    exact = exact_norm(x, weight, bias, 1e-5, center)
    loose = 3 if cpu_backend == "reference" else 1  # plain MLX rounds before it multiplies by the weight
    np.testing.assert_allclose(oracle.wide(y), exact, atol=loose * EPSILON[dtype] * max(1, np.abs(exact).max()))


def test_a_norm_of_mixed_types_has_the_promoted_type(rng, cpu_backend):
    x, weight = oracle.random_array(rng, 3, 7, dtype=mx.bfloat16), oracle.random_array(rng, 7)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == mx.float32
    loose = 1e-2 if cpu_backend == "reference" else 1e-5
    np.testing.assert_allclose(oracle.wide(y), exact_norm(x, weight, None, 1e-5, False), atol=loose)


def test_norms_of_views_and_of_large_values(rng, native):
    x = oracle.random_array(rng, 40, 3, 9).transpose(2, 1, 0)[:, ::-1]
    assert mx.array_equal(rms_norm(x, None, 1e-5), rms_norm(mx.array(np.array(x)), None, 1e-5))
    large = mx.array([[6e4, 1.0, -2.0]], dtype=mx.float16)  # its square is no float16
    np.testing.assert_allclose(oracle.wide(rms_norm(large, None, 1e-5)), exact_norm(large, None, None, 1e-5, False), atol=2e-3)
    broken = mx.array([[1.0, mx.nan], [1.0, 2.0]])
    assert mx.isnan(rms_norm(broken, None, 1e-5)).any(axis=1).tolist() == [True, False]


def test_the_gradients_of_norms(rng, native):
    x, weight, bias = oracle.random_array(rng, 5, 7), oracle.random_array(rng, 7), oracle.random_array(rng, 7)
    assert_same_gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    assert_same_gradients(lambda x, w, b: layer_norm(x, w, b, 1e-5), x, weight, bias)
    ours, plain = (mx.jvp(partial(f, weight=weight, eps=1e-5), [x], [mx.ones_like(x)])[1][0] for f in (rms_norm, mx.fast.rms_norm))
    np.testing.assert_allclose(np.array(ours), np.array(plain), atol=1e-5)


def test_norms_compiled_and_mapped(rng, native):
    x, weight = oracle.random_array(rng, 4, 5, 7), oracle.random_array(rng, 7)
    y = rms_norm(x, weight, 1e-5)
    assert mx.array_equal(mx.compile(lambda x: rms_norm(x, weight, 1e-5))(x), y)
    np.testing.assert_allclose(np.array(mx.vmap(lambda x: rms_norm(x, weight, 1e-5))(x)), np.array(y), atol=1e-6)


# ---------------------------------------------------------------- rotary positions


def exact_rope(x, dims, traditional, periods, scale, offset):
    x = oracle.wide(x)
    y, turning = x.copy(), x[..., :dims]
    angles = (np.arange(x.shape[-2]) + offset)[:, None] * scale / periods
    c, s = np.cos(angles), np.sin(angles)
    a, b = (turning[..., ::2], turning[..., 1::2]) if traditional else (turning[..., : dims // 2], turning[..., dims // 2 :])
    both = a * c - b * s, b * c + a * s
    y[..., :dims] = np.stack(both, -1).reshape(turning.shape) if traditional else np.concatenate(both, -1)
    return y


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 7, 6), (1, 2, 130, 66), (5, 4, 9), (2, 1, 3, 2, 10)], ids=str)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("given", ["base", "freqs"])
def test_rope(rng, cpu_backend, shape, dtype, traditional, given):
    x = oracle.random_array(rng, *shape, dtype=dtype)
    for dims in {2, shape[-1] // 2 * 2}:
        # mlx-lm writes a period that is infinite for pairs that do not turn.
        freqs = np.append(rng.random(dims // 2 - 1) * 100 + 1, np.inf).astype(np.float32)
        periods = 500.0 ** (np.arange(0, dims, 2) / dims) if given == "base" else freqs.astype(np.float64)
        how = {"base": 500.0, "freqs": None} if given == "base" else {"base": None, "freqs": mx.array(freqs)}
        for scale, offset in ((1.0, 0), (0.25, 17)):
            y = rope(x, dims, traditional=traditional, scale=scale, offset=offset, **how)
            assert y.dtype == dtype
            loose = 20 if cpu_backend == "reference" else 1  # plain MLX computes the angles in float32, and rounds their cosines to the type
            np.testing.assert_allclose(oracle.wide(y), exact_rope(x, dims, traditional, periods, scale, offset), atol=loose * EPSILON[dtype])


def test_rope_remembers_no_other_angles(rng, native):
    """The angles of the last few calls are kept."""
    x = oracle.random_array(rng, 1, 2, 5, 8)
    for base in (10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 10.0):
        for offset in (0, 3):
            y = rope(x, 8, traditional=False, base=base, scale=1.0, offset=offset)
            np.testing.assert_allclose(oracle.wide(y), exact_rope(x, 8, False, base ** (np.arange(0, 8, 2) / 8), 1.0, offset), atol=3e-6)
    for last in (3.0, 4.0):
        freqs = mx.array([1.0, 2.0, 3.0, last])
        y = rope(x, 8, traditional=False, base=None, scale=1.0, freqs=freqs)
        np.testing.assert_allclose(oracle.wide(y), exact_rope(x, 8, False, oracle.wide(freqs), 1.0, 0), atol=3e-6)


def test_rope_of_views_and_its_transformations(rng, native):
    x = oracle.random_array(rng, 2, 5, 3, 8).transpose(0, 2, 1, 3)

    def turned(x):
        return rope(x, 6, traditional=False, base=100.0, scale=1.0, offset=2)

    y = turned(x)
    assert mx.array_equal(y, turned(mx.array(np.array(x))))
    assert mx.array_equal(mx.compile(turned)(x), y)
    np.testing.assert_allclose(np.array(mx.vmap(turned)(x)), np.array(y), atol=1e-5)
    assert_same_gradients(turned, x)


@pytest.mark.parametrize(
    "arguments",
    [
        (mx.zeros(4), 4, False, 10.0, 1.0),
        (mx.zeros((3, 4)), 3, False, 10.0, 1.0),
        (mx.zeros((3, 4)), 6, False, 10.0, 1.0),
        (mx.zeros((3, 4)), 0, False, 10.0, 1.0),
        (mx.zeros((3, 4)), 4, False, None, 1.0),
        (mx.zeros((3, 4)), 4, False, 10.0, 1.0, 0, mx.ones(2)),
        (mx.zeros((3, 4)), 4, False, None, 1.0, 0, mx.ones(3)),
        (mx.zeros((3, 4), dtype=mx.int32), 4, False, 10.0, 1.0),
    ],
)
def test_rotations_that_do_not_fit_are_refused_by_the_extension(arguments):
    with pytest.raises(ValueError, match=r"\[metalens\]"):
        _ext.rope(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _ext.rms_norm(mx.zeros((2, 3)), mx.zeros(2)),
        lambda: _ext.rms_norm(mx.zeros((2, 0))),
        lambda: _ext.layer_norm(mx.zeros((2, 3)), mx.zeros(3), mx.zeros(3, dtype=mx.int32)),
        lambda: _ext.gelu_tanh(mx.zeros(3, dtype=mx.int32)),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_the_extension(call):
    with pytest.raises(ValueError, match=r"\[metalens\]"):
        call()


# ---------------------------------------------------------------- activations


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


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (7, 5), (3, 5000)], ids=str)
def test_gelu_approx(rng, cpu_backend, shape, dtype):
    x = oracle.random_array(rng, *shape, dtype=dtype, scale=3.0)
    y = gelu_approx(x)
    assert (y.dtype, y.shape) == (dtype, shape)
    v = oracle.wide(x)
    exact = 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    loose = 4 if cpu_backend == "reference" else 1  # plain MLX rounds between its operations
    np.testing.assert_allclose(oracle.wide(y), exact, atol=loose * EPSILON[dtype], rtol=loose * EPSILON[dtype])


def test_gelu_approx_at_the_ends_of_its_range_and_its_gradient(rng, native):
    y = np.array(gelu_approx(mx.array([-1e4, -20.0, 0.0, 20.0, 1e4, mx.inf, mx.nan])))
    np.testing.assert_allclose(y[:6], [0, 0, 0, 20, 1e4, np.inf], atol=1e-30)
    assert np.isnan(y[6])
    assert_same_gradients(gelu_approx, oracle.random_array(rng, 5, 7))


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_sums_and_products_keep_every_bit(rng, native, dtype):
    x, y, row = (oracle.random_array(rng, *shape, dtype=dtype) for shape in ((3, 130, 65), (3, 130, 65), (65,)))

    def chain():
        total = x + y
        scaled = total * mx.array(1.7, dtype=dtype) + row
        return [total, scaled * y, scaled[:, ::2] + scaled[:, 1::2], (x.T + y.T).T, (x.astype(mx.float32) + y).astype(dtype), mx.exp(total) + total]

    plain, ours = chain(), chain()
    mx.eval(plain)
    run_sums_natively(ours)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b)


def test_sums_of_large_arrays_that_nothing_else_needs(native):
    """Such a sum takes the memory of an input."""
    x = mx.arange(100000).astype(mx.float16).reshape(100, 1000) / 1000
    mx.eval(x)
    y = mx.exp(-x) + mx.exp(-2 * x)
    z = mx.exp(-x)
    both = z + mx.exp(-2 * x)
    run_sums_natively([y, both])
    assert mx.array_equal(y, both)
    assert mx.array_equal(z, mx.exp(-x))


def test_what_is_evaluated_or_traced_stays_as_it_is(rng, native):
    x = oracle.random_array(rng, 4, 5)
    done = x + x
    mx.eval(done)
    run_sums_natively([done, x])
    assert mx.array_equal(done, 2 * x)

    def loss(x):
        y = x + x * x
        run_sums_natively([y])
        return mx.sum(y)

    np.testing.assert_allclose(np.array(mx.grad(loss)(x)), 1 + 2 * np.array(x), atol=1e-6)
    np.testing.assert_allclose(np.array(mx.compile(loss)(x)), np.array(loss(x)), rtol=1e-6)


def test_the_reference_backend_leaves_sums_to_mlx(rng, monkeypatch):
    monkeypatch.setattr(_ext, "run_sums_natively", None)
    x = oracle.random_array(rng, 4, 5)
    with use_backend("reference"):
        run_sums_natively([x + x])


# ---------------------------------------------------------------- threads

SCRIPT = """
import hashlib
import mlx.core as mx, numpy as np
from support import oracle
from metalens import use_backend
from metalens.ops import attention, gelu_approx, layer_norm, rms_norm, rope, swiglu
from metalens.ops.sums import run_sums_natively
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(3)
with use_backend("native"):
    for dtype in (mx.float32, mx.float16):
        x, y = (oracle.random_array(rng, 300, 130, dtype=dtype) for _ in range(2))
        q = oracle.random_array(rng, 2, 4, 300, 24, dtype=dtype)
        results = [rms_norm(x, y[0], 1e-5), layer_norm(x, None, None, 1e-5), swiglu(x, y), gelu_approx(x), x + y]
        results += [rope(q, 24, traditional=False, base=100.0, scale=1.0), attention(q, q[:, :2], q[:, 2:], scale=0.3, mask="causal")]
        run_sums_natively(results)
        print([hashlib.sha256(np.array(a).tobytes()).hexdigest() for a in results])
"""


def test_results_do_not_depend_on_the_number_of_threads(run_python):
    one, three = (run_python(SCRIPT, METALENS_NUM_THREADS=str(threads)) for threads in (1, 3))
    assert one == three
    assert len(one.splitlines()) == 2
