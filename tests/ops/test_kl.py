"""lens_kl: values, gradient, shapes and types."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, LensTarget, Weight, chunks, lens_kl, lens_target
from support import oracle

pytestmark = pytest.mark.usefixtures("each_backend")

V, D, L, N = 131, 64, 3, 5

# For rows about one nat apart: the reference adds float32 terms of both signs and of size up to 1.
ABSOLUTE = 1e-5


def make_rows(rng, layers=L, tokens=N, width=D):
    """Make rows of a lens near the model's, as in practice."""
    n_model = oracle.random_array(rng, tokens, width)
    return n_model[None] + oracle.random_array(rng, layers, tokens, width, scale=0.3), n_model


def kl_to_model(n, n_model, head):
    return lens_kl(n, lens_target(n_model, head), head)


def assert_expected(results, n, n_model, head):
    for ours, expected in zip(results, oracle.lens_kl(n, n_model, head), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, mx.float32)
        np.testing.assert_allclose(oracle.wide(ours), expected, atol=ABSOLUTE, rtol=ABSOLUTE)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("quantized", [True, False])
def test_kl_and_gradient(rng, quantized, settings):
    head, (n, n_model) = oracle.make_head(rng, V, D, quantized, **settings), make_rows(rng)
    assert_expected(kl_to_model(n, n_model, head), n, n_model, head)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_gradient_is_the_slope_of_the_kl(rng, settings):
    head, (n, n_model) = oracle.make_head(rng, V, D, **settings), make_rows(rng)
    gradient = kl_to_model(n, n_model, head)[1]
    z_model, values = oracle.head_logits(oracle.wide(n_model), head), oracle.wide(n)
    for index in [(0, 0, 0), (1, 4, 63), (2, 2, 17), (0, 3, 40), (2, 4, 1)]:
        row = index[:2]

        def kl_of_row(row=row):
            return oracle.kl(z_model[row[1]], oracle.head_logits(values[row], head))

        slope = oracle.central_difference(kl_of_row, values, index)
        assert float(gradient[index].item()) == pytest.approx(slope, abs=ABSOLUTE)


def test_gradient_against_automatic_differentiation(rng):
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True, scale=2.0, softcap=6.0), make_rows(rng)

    def total(n):
        def logits(rows):
            w = head.weight
            z = mx.quantized_matmul(rows, w.values, w.scales, w.biases, True, w.group_size, w.bits) + head.bias
            return head.softcap * mx.tanh(z * head.scale / head.softcap)

        z, z_model = logits(n), logits(n_model)
        log_q, log_p = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (z, z_model))
        return mx.sum(mx.exp(log_p) * (log_p - log_q))

    np.testing.assert_allclose(oracle.wide(kl_to_model(n, n_model, head)[1]), oracle.wide(mx.grad(total)(n)), atol=ABSOLUTE)


@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_heads_of_the_8_bit_scaled_formats(rng, mode):
    head = Head(Weight(*mx.quantize(oracle.random_array(rng, V, D, scale=0.2), mode=mode), None, *reversed(oracle.FLOAT_MODES[mode]), mode))
    n, n_model = make_rows(rng)
    assert_expected(kl_to_model(n, n_model, head), n, n_model, head)


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 1000])
def test_vocabularies_around_a_block(rng, vocab_size):
    head, (n, n_model) = oracle.make_head(rng, vocab_size, 32, bias=True), make_rows(rng, width=32)
    assert_expected(kl_to_model(n, n_model, head), n, n_model, head)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (3, 1), (1, 4), (300, 1), (300, 2), (2, 300), (100, 5)])
def test_more_rows_than_a_block_holds_and_fewer(rng, layers, tokens):
    head, (n, n_model) = oracle.make_head(rng, V, 32, bias=True), make_rows(rng, layers, tokens, 32)
    assert_expected(kl_to_model(n, n_model, head), n, n_model, head)


@pytest.mark.parametrize("settings", [{"bias": True}, {"softcap": 6.0}], ids=["linear", "softcap"])
def test_vocabulary_beyond_16_bits(rng, settings):
    head, (n, n_model) = oracle.make_head(rng, 70_001, 32, **settings), make_rows(rng, 2, 2, 32)
    assert_expected(kl_to_model(n, n_model, head), n, n_model, head)


@pytest.mark.parametrize("settings", [{"bias": True}, {"softcap": 6.0}], ids=["linear", "softcap"])
def test_padding_rows_are_as_if_they_were_not_there(rng, settings):
    whole, (n, n_model) = oracle.make_head(rng, V, D, **settings), make_rows(rng)
    w, used = whole.weight, 100
    transform = {"scale": whole.scale, "softcap": whole.softcap}
    padded = Head(w, whole.bias, **transform, used_rows=used)
    rest = Head(
        Weight(w.values[:used], w.scales[:used], w.biases[:used], w.group_size, w.bits),
        None if whole.bias is None else whole.bias[:used],
        **transform,
    )
    for ours, expected in zip(kl_to_model(n, n_model, padded), kl_to_model(n, n_model, rest), strict=True):
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(expected), atol=ABSOLUTE)


def test_tokens_that_the_head_rules_out(rng):
    # A bias of -inf: p and q are 0 there, and 0 * (-inf + inf) must not become NaN.
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True), make_rows(rng)
    head.bias[100:] = -float("inf")
    head.bias[3] = -float("inf")
    kl, gradient = kl_to_model(n, n_model, head)
    kept = np.setdiff1d(np.arange(100), [3])
    z_model, z = (oracle.head_logits(oracle.wide(a), head)[..., kept] for a in (n_model, n))
    value, difference = oracle.kl_and_difference(z_model, z)
    np.testing.assert_allclose(oracle.wide(kl), value, atol=ABSOLUTE)
    np.testing.assert_allclose(oracle.wide(gradient), difference @ oracle.matrix(head.weight)[kept], atol=ABSOLUTE)


def test_sums_over_many_equal_tokens():
    # Nearly all tokens are equally unlikely, so the rounding errors of their equal terms have the same sign. Added one by one in float32, they
    # changed the log-sum-exps, and the KL with them, by far more than the KL itself. It became negative.
    z, z_model = np.zeros(128_256), np.full(128_256, -0.7)
    z[0], z_model[:2] = 1.0, (0.5, 1.0)
    head = Head(Weight(mx.array(np.stack([z, z_model], axis=1).astype(np.float32))))
    kl, _ = kl_to_model(mx.array([[[1.0, 0.0]]]), mx.array([[0.0, 1.0]]), head)
    assert kl.item() == pytest.approx(oracle.kl(z_model.astype(np.float32).astype(float), z), abs=1e-5)


def test_a_vocabulary_of_one_token(rng):
    n, n_model = oracle.random_array(rng, 2, 3, 32), oracle.random_array(rng, 3, 32)
    kl, gradient = kl_to_model(n, n_model, Head(Weight(oracle.random_array(rng, 1, 32))))
    np.testing.assert_allclose(oracle.wide(kl), 0, atol=1e-6)
    np.testing.assert_allclose(oracle.wide(gradient), 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_of_16_bits_lose_nothing_more(rng, dtype):
    head, (n, n_model) = oracle.make_head(rng, V, D), (a.astype(dtype) for a in make_rows(rng))
    assert_expected(kl_to_model(n, n_model, head), n, n_model, head)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("settings", [{"bias": True}, {"softcap": 6.0}], ids=["linear", "softcap"])
def test_a_bad_row_stays_alone(rng, settings, bad):
    head, (n, n_model) = oracle.make_head(rng, V, D, **settings), make_rows(rng)
    clean = [oracle.wide(a) for a in kl_to_model(n, n_model, head)]
    n[1, 2, 7] = bad
    kl, gradient = (oracle.wide(a) for a in kl_to_model(n, n_model, head))
    if np.isnan(bad):
        assert np.isnan(kl[1, 2])
        assert np.isnan(gradient[1, 2]).all()
    kl[1, 2], gradient[1, 2] = clean[0][1, 2], clean[1][1, 2]
    np.testing.assert_allclose(kl, clean[0], atol=ABSOLUTE)
    np.testing.assert_allclose(gradient, clean[1], atol=ABSOLUTE)


def test_a_bad_row_of_the_model_spoils_that_token_alone(rng):
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True), make_rows(rng)
    n_model[2, 7] = float("nan")
    kl, gradient = (oracle.wide(a) for a in kl_to_model(n, n_model, head))
    assert np.isnan(kl[:, 2]).all()
    assert np.isnan(gradient[:, 2]).all()
    others = mx.array([0, 1, 3, 4])
    assert_expected((mx.array(kl)[:, others], mx.array(gradient)[:, others]), n[:, others], n_model[others], head)


@pytest.mark.parametrize("budget", [1, 4 * V * L, 4 * V * L * 2, 4 * V * L * N - 1])
def test_chunks_change_nothing(rng, monkeypatch, budget):
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True), make_rows(rng)
    whole = kl_to_model(n, n_model, head)
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, budget)
    assert chunks.tokens_per_chunk(L, V) < N
    for ours, expected in zip(kl_to_model(n, n_model, head), whole, strict=True):
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(expected), atol=2e-6)


@pytest.mark.parametrize(("layers", "tokens"), [(L, 0), (0, N), (0, 0)])
def test_no_layers_or_no_tokens(rng, layers, tokens):
    head = oracle.make_head(rng, V, D)
    kl, gradient = kl_to_model(mx.zeros((layers, tokens, D)), mx.zeros((tokens, D)), head)
    mx.eval(kl, gradient)
    assert (kl.shape, gradient.shape) == ((layers, tokens), (layers, tokens, D))


@pytest.mark.parametrize(
    ("n", "n_model"),
    [((N, D), (N, D)), ((L, N, D), (N + 1, D)), ((L, N, D + 1), (N, D)), ((1, L, N, D), (N, D)), ((L, N), (N, D)), ((), (N, D))],
)
def test_rows_that_do_not_fit_the_target(rng, n, n_model):
    head = oracle.make_head(rng, V, D)
    target = lens_target(mx.zeros(n_model), head)
    with pytest.raises(ValueError, match=rf"lens_kl needs n \[L, N, {D}\] and a target of n_model \[N, {D}\]; got"):
        lens_kl(mx.zeros(n), target, head)


def test_a_target_of_another_head_does_not_fit(rng):
    wide = oracle.make_head(rng, V, 2 * D)
    with pytest.raises(ValueError, match="lens_kl needs"):
        lens_kl(mx.zeros((L, N, D)), lens_target(mx.zeros((N, 2 * D)), wide), oracle.make_head(rng, V, D))


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_a_target_of_the_other_backend_does_as_well(rng, each_backend, settings):
    from metalens import use_backend

    head, (n, n_model) = oracle.make_head(rng, V, D, **settings), make_rows(rng)
    with use_backend("reference" if each_backend == "native" else "native"):
        target = lens_target(n_model, head)
    assert isinstance(target, LensTarget)
    assert_expected(lens_kl(n, target, head), n, n_model, head)
