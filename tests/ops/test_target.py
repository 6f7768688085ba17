"""lens_target: the model's own prediction for its tokens."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, LensTarget, Weight, chunks, lens_target, use_backend
from support import oracle

pytestmark = pytest.mark.usefixtures("each_backend")

V, D, N = 131, 64, 5
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums of logits of size 1 to 10


def expected(n_model, head):
    z = oracle.head_logits(oracle.wide(n_model), head)
    log_p = oracle.log_softmax(z)
    possible = np.isfinite(log_p)
    return (np.where(possible, z, 0) - np.where(possible, log_p, 0))[..., 0], oracle.entropy(z), np.exp(log_p) @ oracle.matrix(head.weight)


def assert_expected(target, n_model, head):
    lse, entropy, mean = expected(n_model, head)
    assert (target.lse.dtype, target.entropy.dtype, target.n.dtype) == (mx.float32,) * 3
    np.testing.assert_array_equal(oracle.wide(target.n), oracle.wide(n_model))
    np.testing.assert_allclose(oracle.wide(target.lse), lse, **TOLERANCE)
    np.testing.assert_allclose(oracle.wide(target.entropy), entropy, **TOLERANCE)
    if target.mean is not None:
        np.testing.assert_allclose(oracle.wide(target.mean), mean, **TOLERANCE)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("quantized", [True, False])
def test_log_sum_entropy_and_mean(rng, each_backend, quantized, settings):
    head, n_model = oracle.make_head(rng, V, D, quantized, **settings), oracle.random_array(rng, N, D)
    target = lens_target(n_model, head)
    assert isinstance(target, LensTarget)
    assert_expected(target, n_model, head)
    # A softcap gives every logit its own slope, which a mean row of U does not contain.
    assert (target.mean is not None) == (each_backend == "native" and head.softcap is None)


@pytest.mark.parametrize(("vocab_size", "tokens"), [(1, 3), (2, 1), (255, 3), (256, 300), (257, 5), (1000, 2), (70_001, 1), (70_001, 5)])
def test_every_size_of_vocabulary_and_rows(rng, vocab_size, tokens):
    head, n_model = oracle.make_head(rng, vocab_size, 32, bias=True), oracle.random_array(rng, tokens, 32)
    assert_expected(lens_target(n_model, head), n_model, head)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_of_16_bits(rng, dtype):
    head, n_model = oracle.make_head(rng, V, D), oracle.random_array(rng, N, D, dtype=dtype)
    assert_expected(lens_target(n_model, head), n_model, head)


def test_large_logits_and_impossible_tokens(rng):
    head, n_model = oracle.make_head(rng, V, D, bias=True, scale=1000.0), oracle.random_array(rng, N, D)
    head.bias[::3] = -float("inf")
    z = oracle.head_logits(oracle.wide(n_model), head)
    target = lens_target(n_model, head)
    np.testing.assert_allclose(oracle.wide(target.lse), z[..., 1] - oracle.log_softmax(z)[..., 1], rtol=1e-5)
    np.testing.assert_allclose(oracle.wide(target.entropy), oracle.entropy(z), atol=2e-2)  # logits in the thousands are rounded by 1e-3


def test_a_flat_prediction_over_a_large_vocabulary():
    target = lens_target(mx.zeros((2, 2)), Head(Weight(mx.ones((128_256, 2)))))
    np.testing.assert_allclose(oracle.wide(target.lse), np.log(128_256), rtol=1e-6)
    np.testing.assert_allclose(oracle.wide(target.entropy), np.log(128_256), rtol=1e-6)


def test_nan_rows_are_nan_and_alone(rng):
    head, n_model = oracle.make_head(rng, V, D, bias=True), oracle.random_array(rng, N, D)
    n_model[2, 3] = float("nan")
    target = lens_target(n_model, head)
    for values in (target.lse, target.entropy, target.mean):
        if values is not None:
            assert np.isnan(oracle.wide(values)).reshape(N, -1).all(axis=1).tolist() == [False, False, True, False, False]


def test_no_tokens(rng):
    target = lens_target(mx.zeros((0, D)), oracle.make_head(rng, V, D))
    mx.eval(target.lse, target.entropy, target.n)
    assert (target.lse.shape, target.entropy.shape, target.n.shape) == ((0,), (0,), (0, D))


def test_chunks_change_nothing(rng, monkeypatch):
    head, n_model = oracle.make_head(rng, V, D, bias=True), oracle.random_array(rng, N, D)
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, 1)
    assert_expected(lens_target(n_model, head), n_model, head)


@pytest.mark.parametrize("shape", [(D,), (N, D - 1), (1, N, D), ()])
def test_rows_that_do_not_fit(rng, shape):
    with pytest.raises(ValueError, match=rf"lens_target needs n_model \[N, {D}\]"):
        lens_target(mx.zeros(shape), oracle.make_head(rng, V, D))


def test_the_model_is_frozen(rng):
    head, n_model = oracle.make_head(rng, V, D), oracle.random_array(rng, N, D)

    def total(n_model):
        target = lens_target(n_model, head)
        return mx.sum(target.lse) + mx.sum(target.entropy) + mx.sum(target.n) + (0 if target.mean is None else mx.sum(target.mean))

    assert not np.any(oracle.wide(mx.grad(total)(n_model)))


@pytest.mark.parametrize("backend", ["native", "reference"])  # the emulation of Metal kernels computes at the call
def test_nothing_is_evaluated_at_the_call(rng, monkeypatch, backend):
    head, n_model = oracle.make_head(rng, V, D), oracle.random_array(rng, N, D)
    mx.eval(n_model)

    def refuse(*_):
        raise AssertionError("evaluated")

    monkeypatch.setattr(mx, "eval", refuse)
    with use_backend(backend):
        assert lens_target(n_model, head).lse.shape == (N,)
