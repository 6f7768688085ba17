import mlx.core as mx
import numpy as np
import pytest

import oracle
from metalens.ops import Head, Weight, chunks, lens_kl

pytestmark = pytest.mark.usefixtures("each_backend")

V, D, L, N = 131, 64, 3, 5


def make_rows(rng, tokens=N, width=D):
    """Rows of the lens near the model's, as they are in practice."""
    n_model = oracle.random_array(rng, tokens, width)
    return n_model[None] + oracle.random_array(rng, L, tokens, width, scale=0.3), n_model


def expected_kl(n, n_model, head):
    return oracle.kl(oracle.head_logits(oracle.wide(n_model), head), oracle.head_logits(oracle.wide(n), head))


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("quantised", [True, False])
def test_kl_and_gradient(rng, quantised, settings):
    head, (n, n_model) = oracle.make_head(rng, V, D, quantised, **settings), make_rows(rng)
    kl, gradient = lens_kl(n, n_model, head)
    assert (kl.shape, kl.dtype, gradient.shape, gradient.dtype) == ((L, N), mx.float32, (L, N, D), mx.float32)
    np.testing.assert_allclose(oracle.wide(kl), expected_kl(n, n_model, head), atol=1e-5)

    z_model, values = oracle.head_logits(oracle.wide(n_model), head), oracle.wide(n)
    for index in [(0, 0, 0), (1, 4, 63), (2, 2, 17), (0, 3, 40), (2, 4, 1)]:
        row = index[:2]

        def kl_of_row(row=row):
            return oracle.kl(z_model[row[1]], oracle.head_logits(values[row], head))

        slope = oracle.central_difference(kl_of_row, values, index)
        assert float(gradient[index].item()) == pytest.approx(slope, abs=1e-5)


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

    np.testing.assert_allclose(oracle.wide(lens_kl(n, n_model, head)[1]), oracle.wide(mx.grad(total)(n)), atol=1e-5)


def test_the_model_against_itself_is_zero(rng):
    _, n_model = make_rows(rng)
    kl, gradient = lens_kl(mx.broadcast_to(n_model, (L, N, D)), n_model, oracle.make_head(rng, V, D, bias=True))
    assert np.abs(oracle.wide(kl)).max() < 1e-6
    assert np.abs(oracle.wide(gradient)).max() < 1e-6


def test_gradient_of_a_nearly_perfect_lens(rng):
    # q - p is a thousandth of q: multiplied with U before the subtraction, rounding would be as large as the result.
    head, n_model = oracle.make_head(rng, V, D, bias=True), make_rows(rng)[1]
    n = n_model[None] + oracle.random_array(rng, L, N, D, scale=1e-3)
    gradient = oracle.wide(lens_kl(n, n_model, head)[1])
    p, q = (oracle.softmax(oracle.head_logits(oracle.wide(a), head)) for a in (n_model, n))
    expected = (q - p) @ oracle.matrix(head.weight)
    assert np.abs(gradient - expected).max() < 1e-3 * np.abs(expected).max()


def test_tokens_that_the_head_rules_out(rng):
    # A bias of -inf (padding rows of the vocabulary): p and q are 0 there, and 0 * (-inf + inf) must not become NaN.
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True), make_rows(rng)
    head.bias[100:] = -float("inf")
    kl, gradient = lens_kl(n, n_model, head)
    w = head.weight
    rest = Head(Weight(w.values[:100], w.scales[:100], w.biases[:100], w.group_size, w.bits), head.bias[:100])
    np.testing.assert_allclose(oracle.wide(kl), expected_kl(n, n_model, rest), atol=1e-5)
    np.testing.assert_allclose(oracle.wide(gradient), oracle.wide(lens_kl(n, n_model, rest)[1]), atol=1e-5)


def test_probabilities_that_underflow(rng):
    # Logits some hundreds apart: float32 probabilities of 0 in both, and a KL in the hundreds.
    n, n_model = make_rows(rng)
    head = oracle.make_head(rng, V, D, bias=True, scale=50.0)
    kl, gradient = lens_kl(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected_kl(n, n_model, head), rtol=1e-4, atol=1e-3)
    assert np.isfinite(oracle.wide(gradient)).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_of_16_bits_lose_nothing_more(rng, dtype):
    head, (n, n_model) = oracle.make_head(rng, V, D), (a.astype(dtype) for a in make_rows(rng))
    kl, gradient = lens_kl(n, n_model, head)
    assert kl.dtype == gradient.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(kl), expected_kl(n, n_model, head), atol=1e-5)


@pytest.mark.parametrize("budget", [1, 4 * V * L, 4 * V * L * 2, 4 * V * L * N - 1])
def test_chunks_change_nothing(rng, monkeypatch, budget):
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True), make_rows(rng)
    whole = lens_kl(n, n_model, head)
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, budget)
    assert len(list(chunks.token_chunks(N, L, V))) > 1
    for ours, expected in zip(lens_kl(n, n_model, head), whole, strict=True):
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(expected), atol=2e-6)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("vocab_size", [1, 1000, 10**9])
def test_chunks_cover_every_token_once_within_the_budget(monkeypatch, tokens, layers, vocab_size):
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, 40_000)
    slices = list(chunks.token_chunks(tokens, layers, vocab_size))
    assert [t for s in slices for t in range(s.start, s.stop)] == list(range(tokens))
    # One token must go through whatever it costs.
    assert all((s.stop - s.start) * layers * vocab_size * 4 <= 40_000 or s.stop - s.start == 1 for s in slices)


def test_no_tokens(rng):
    kl, gradient = lens_kl(mx.zeros((L, 0, D)), mx.zeros((0, D)), oracle.make_head(rng, V, D))
    assert (kl.shape, gradient.shape) == ((L, 0), (L, 0, D))


def test_vocabulary_beyond_16_bits(rng):
    head = Head(oracle.random_weight(rng, 66001, 32, scale=0.2))
    n, n_model = make_rows(rng, tokens=2, width=32)
    kl, gradient = lens_kl(n[:1], n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected_kl(n[:1], n_model, head), atol=1e-5)
    p, q = (oracle.softmax(oracle.head_logits(oracle.wide(a), head)) for a in (n_model, n[:1]))
    np.testing.assert_allclose(oracle.wide(gradient), (q - p) @ oracle.matrix(head.weight), atol=1e-5)


def test_sums_over_many_equal_tokens():
    # Nearly all tokens are equally unlikely, so the rounding errors of their equal terms all point the same way: added up one by one in float32, they
    # put the log-sum-exps, and with them the KL, off by far more than the KL itself. It came out negative.
    z, z_model = np.zeros(128_256), np.full(128_256, -0.7)
    z[0], z_model[:2] = 1.0, (0.5, 1.0)
    kl, _ = lens_kl(mx.array([[[1.0, 0.0]]]), mx.array([[0.0, 1.0]]), Head(Weight(mx.array(np.stack([z, z_model], axis=1).astype(np.float32)))))
    assert kl.item() == pytest.approx(oracle.kl(z_model.astype(np.float32).astype(float), z), abs=1e-5)


def test_a_vocabulary_of_one_token(rng):
    kl, gradient = lens_kl(oracle.random_array(rng, 2, 3, 32), oracle.random_array(rng, 3, 32), Head(Weight(oracle.random_array(rng, 1, 32))))
    assert mx.array_equal(kl, mx.zeros((2, 3)))
    assert mx.array_equal(gradient, mx.zeros((2, 3, 32)))


@pytest.mark.parametrize(
    ("n", "n_model"),
    [((N, D), (N, D)), ((L, N, D), (N + 1, D)), ((L, N, D), (1, N, D)), ((L, N, D - 1), (N, D - 1)), ((L, N, D), (N, D - 1))],
)
def test_shapes_that_do_not_fit(rng, n, n_model):
    with pytest.raises(ValueError, match="lens_kl needs"):
        lens_kl(mx.zeros(n), mx.zeros(n_model), oracle.make_head(rng, V, D))
