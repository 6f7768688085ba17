"""lens_kl on difficult rows: rows nearly equal to the model's, and rows far from them."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, Weight, lens_kl, lens_target
from support import oracle

V, D, L, N = 1003, 96, 2, 6

# Error of the native kernels, relative to the KL and, row by row, to the length of the gradient, at any size. They compute the difference of the
# logits from the difference of the rows, so only its own float32 roundings count (measured: 3e-6).
NATIVE = 1e-4
# Error of the reference, relative to log-probabilities of about 1: it subtracts two float32 softmaxes (measured: 1e-6 in the KL).
REFERENCE = 1e-5


def rows(rng, noise, tokens=N):
    n_model = oracle.random_array(rng, tokens, D)
    return n_model[None] + oracle.random_array(rng, L, tokens, D, scale=noise), n_model


def kl_to_model(n, n_model, head):
    return lens_kl(n, lens_target(n_model, head), head)


def difference_size(n, n_model, head):
    """Return |q - p| |U| of every row: the scale for errors of the gradient where a softcap is so flat that the gradient vanishes."""
    z_model, z = (oracle.head_logits(oracle.wide(a), head) for a in (n_model, n))
    _, difference = oracle.kl_and_difference(z_model, z)
    return abs(head.scale) * np.linalg.norm(difference, axis=-1) * np.linalg.norm(oracle.matrix(head.weight), axis=1).max()


def assert_gradient(ours, expected, n, n_model, head, tolerance):
    error = np.linalg.norm(oracle.wide(ours) - expected, axis=-1)
    size = np.linalg.norm(expected, axis=-1) if head.softcap is None else difference_size(n, n_model, head)
    assert (error / size).max() < tolerance


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_native_is_exact_to_its_last_digits_however_near_the_model(rng, native, settings, noise):
    head, (n, n_model) = oracle.make_head(rng, V, D, **settings), rows(rng, noise)
    expected, slope = oracle.lens_kl(n, n_model, head)
    assert noise > 1e-5 or expected.min() < 1e-10
    kl, gradient = kl_to_model(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=NATIVE, atol=0)
    assert oracle.row_errors(gradient, slope).max() < NATIVE


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_near_the_model_both_backends_are_exact_to_float32(rng, each_backend, settings, noise):
    head, (n, n_model) = oracle.make_head(rng, V, D, **settings), rows(rng, noise)
    expected, slope = oracle.lens_kl(n, n_model, head)
    kl, gradient = kl_to_model(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, atol=REFERENCE)
    np.testing.assert_allclose(oracle.wide(gradient), slope, atol=REFERENCE)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_model_against_itself(rng, each_backend, settings):
    head, (_, n_model) = oracle.make_head(rng, V, D, **settings), rows(rng, 1)
    kl, gradient = kl_to_model(mx.broadcast_to(n_model, (L, N, D)), n_model, head)
    if each_backend == "native":
        assert not np.any(oracle.wide(kl))
        assert not np.any(oracle.wide(gradient))
    np.testing.assert_allclose(oracle.wide(kl), 0, atol=1e-6)
    np.testing.assert_allclose(oracle.wide(gradient), 0, atol=1e-6)


@pytest.mark.parametrize("noise", [0.5, 1, 2, 4, 8, 16, 32, 100, 300])
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_far_from_the_model(rng, each_backend, settings, noise):
    # KLs from 0.1 to thousands: exp(z - z_model) is far beyond float32, and the model gives the lens's own tokens no probability.
    head, (n, n_model) = oracle.make_head(rng, V, D, **settings), rows(rng, noise)
    expected, slope = oracle.lens_kl(n, n_model, head)
    if noise == 300 and head.softcap is None:
        assert expected.max() > 1000
    kl, gradient = kl_to_model(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=REFERENCE, atol=REFERENCE)
    # Rounding logits in the thousands moves probability between two tokens of nearly equal likelihood.
    logits = np.abs(oracle.head_logits(oracle.wide(n), head))
    tolerance = NATIVE + 1e-6 * logits[np.isfinite(logits)].max()
    assert_gradient(gradient, slope, n, n_model, head, tolerance)


@pytest.mark.parametrize("gap", [5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0, 80.0, 90.0, 100.0, 120.0, 1000.0, 1e4])
@pytest.mark.parametrize("softcap", [None, 2e4])
def test_two_certain_predictions_that_disagree(each_backend, gap, softcap):
    # The model is sure of token 0, the lens of token 1, each by `gap` nats: KL = gap, but exp(z - z_model) is exp(2 gap).
    head = Head(Weight(mx.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])), softcap=softcap)
    n_model, n = mx.array([[gap, 0.0]]), mx.array([[[0.0, gap]]])
    kl, gradient = kl_to_model(n, n_model, head)
    expected, slope = oracle.lens_kl(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=REFERENCE)
    np.testing.assert_allclose(oracle.wide(gradient), slope, atol=REFERENCE)


@pytest.mark.parametrize("gap", [1.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0])
def test_a_lens_sure_of_a_token_that_the_model_thinks_possible(each_backend, gap):
    # p is even between two tokens, q is sure of one of them: one term of the KL is about the gap, the other nearly zero.
    head = Head(Weight(mx.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])))
    n_model, n = mx.array([[20.0, 20.0]]), mx.array([[[20.0 - gap, 20.0 + gap]]])
    kl, gradient = kl_to_model(n, n_model, head)
    expected, slope = oracle.lens_kl(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=REFERENCE)
    np.testing.assert_allclose(oracle.wide(gradient), slope, atol=REFERENCE)


@pytest.mark.parametrize("lens", [-20.0, -3.0, -0.1, 0.02, 1.0, 8.0])
@pytest.mark.parametrize("model", [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0])
def test_logits_that_saturate_the_softcap(each_backend, model, lens):
    # Logits in multiples of the cap: beyond 4, tanh is 1 up to the last digits of float32, and the distance to 1 no longer gives the lens's logit.
    cap = 5.0
    head = Head(Weight(mx.array([[1.0], [-1.0], [0.5]])), softcap=cap)
    n_model, n = mx.array([[model * cap]]), mx.array([[[lens * cap]]])
    expected, slope = oracle.lens_kl(n, n_model, head)
    kl, gradient = kl_to_model(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=REFERENCE, atol=REFERENCE)
    np.testing.assert_allclose(oracle.wide(gradient), slope, rtol=NATIVE, atol=REFERENCE)


@pytest.mark.parametrize("softcap", [None, 3e4])
def test_logits_of_tens_of_thousands(rng, each_backend, softcap):
    head = Head(oracle.random_weight(rng, V, D), oracle.random_array(rng, V), scale=1000.0, softcap=softcap)
    n, n_model = rows(rng, 0.3)
    expected, slope = oracle.lens_kl(n, n_model, head)
    assert np.abs(oracle.head_logits(oracle.wide(n), head)).max() > 1e4
    kl, gradient = kl_to_model(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=1e-5, atol=1e-1)  # such logits have rounding errors of 1e-3 to 1e-2
    np.testing.assert_allclose(oracle.wide(gradient), slope, atol=1e-2 * np.abs(slope).max())


def test_near_and_far_rows_of_one_block_do_not_disturb_each_other(rng, native):
    # Far rows need more passes over the vocabulary; near rows are finished after the first.
    head, n_model = oracle.make_head(rng, V, D, bias=True), oracle.random_array(rng, N, D)
    noise = mx.array([1e-4, 300.0, 1e-2, 30.0, 1.0, 1e-6])[None, :, None]
    n = n_model[None] + noise * oracle.random_array(rng, L, N, D)
    expected, slope = oracle.lens_kl(n, n_model, head)
    kl, gradient = kl_to_model(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected, rtol=NATIVE)
    near = [0, 2, 4, 5]
    assert oracle.row_errors(gradient, slope)[:, near].max() < NATIVE


def test_kl_is_never_negative(rng, native):
    head = oracle.make_head(rng, V, D, bias=True)
    for noise in (0, 1e-7, 1e-5, 1e-3, 0.1, 1, 10):
        kl, _ = kl_to_model(*rows(rng, noise), head)
        assert oracle.wide(kl).min() >= 0
