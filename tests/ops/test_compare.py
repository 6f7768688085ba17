"""lens_compare: values for every head and size, near and far predictions, extremes, arguments."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import use_backend
from metalens.ops import Head, Weight, compare, lens_compare
from metalens.ops.backends import extension
from support import oracle

pytestmark = pytest.mark.usefixtures("cpu_backend")

V, D, L, N = 131, 64, 3, 5
INF = float("inf")
ABSOLUTE = 2e-5  # tolerance of float32 sums of logits of size 1 to 10
NAMES = ("kl", "reverse_kl", "js", "tv")


def assert_expected(found, a, b, head, head_b=None, tolerance=ABSOLUTE):
    z_a, z_b = (oracle.head_logits(oracle.wide(rows), h)[..., : h.tokens] for rows, h in ((a, head), (b, head_b or head)))
    expected = oracle.comparison(z_a, np.broadcast_to(z_b, z_a.shape))
    for name in NAMES:
        ours = getattr(found, name)
        assert (ours.shape, ours.dtype) == (a.shape[:2], mx.float32)
        np.testing.assert_allclose(oracle.wide(ours), expected[name], atol=tolerance, rtol=tolerance, err_msg=name)


def rows_of(rng, layers=L, tokens=N, width=D):
    return oracle.random_array(rng, layers, tokens, width)


def constant_heads(*logits):
    """Return rows [1, 1, 2] and heads whose logits are always these."""
    return mx.zeros((1, 1, 2)), *(Head(Weight(mx.zeros((len(z), 2))), mx.array(z)) for z in logits)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("quantized", [True, False])
def test_every_head(rng, quantized, settings):
    head, a, b = oracle.make_head(rng, V, D, quantized, **settings), rows_of(rng), rows_of(rng)
    assert_expected(lens_compare(a, b, head), a, b, head)


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 1000])
def test_vocabularies_around_a_block(rng, vocab_size):
    head, a, b = oracle.make_head(rng, vocab_size, 32, bias=True), rows_of(rng, width=32), rows_of(rng, width=32)
    assert_expected(lens_compare(a, b, head), a, b, head)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (2, 1), (1, 3), (300, 2), (2, 300)])
@pytest.mark.parametrize("one", [False, True])
def test_few_rows_many_rows_and_one_layer_for_all(rng, layers, tokens, one):
    head, a, b = oracle.make_head(rng, V, 32), rows_of(rng, layers, tokens, 32), rows_of(rng, 1 if one else layers, tokens, 32)
    assert_expected(lens_compare(a, b, head), a, b, head)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rows_of_16_bits(rng, dtype):
    head, a, b = oracle.make_head(rng, V, D), rows_of(rng).astype(dtype), rows_of(rng)
    assert_expected(lens_compare(a, b, head), a, b, head)


def test_two_models_with_one_vocabulary(rng):
    # Another width, another format, another softcap, and another number of padding rows.
    head, head_b = oracle.make_head(rng, V + 4, D, padding=4), oracle.make_head(rng, V + 9, 96, quantized=False, bias=True, softcap=5.0, padding=9)
    a, b = rows_of(rng), rows_of(rng, 1, width=96)
    assert_expected(lens_compare(a, b, head, head_b), a, b, head, head_b)


def test_the_arguments_exchanged_exchange_the_kl(rng):
    head, a, b = oracle.make_head(rng, V, D), rows_of(rng), rows_of(rng)
    forward, back = lens_compare(a, b, head), lens_compare(b, a, head)
    for one, other in (("kl", "reverse_kl"), ("reverse_kl", "kl"), ("js", "js"), ("tv", "tv")):
        np.testing.assert_allclose(oracle.wide(getattr(forward, one)), oracle.wide(getattr(back, other)), rtol=1e-5, atol=1e-6)


def test_equal_predictions_differ_by_nothing(rng):
    head, a = oracle.make_head(rng, V, D), rows_of(rng)
    found = lens_compare(a, a + 0, head)
    for name in NAMES:
        assert np.abs(oracle.wide(getattr(found, name))).max() < 1e-6, name


@pytest.mark.parametrize("distance", [1e-3, 0.05, 0.3])
def test_small_divergences_have_small_errors(rng, distance):
    with use_backend("native"):  # the reference subtracts log-probabilities
        head, a = oracle.make_head(rng, V, D), rows_of(rng)
        b = a + oracle.random_array(rng, L, N, D, scale=distance / 8)
        found, expected = lens_compare(a, b, head), oracle.comparison(*(oracle.head_logits(oracle.wide(rows), head) for rows in (a, b)))
    for name in ("kl", "reverse_kl", "js"):
        error = np.abs(oracle.wide(getattr(found, name)) - expected[name])
        assert (error <= 1e-11 + 3e-6 * np.sqrt(expected[name])).all(), name  # what the rounding of the logits alone costs


def test_tokens_that_one_side_rules_out():
    rows, head, other = constant_heads([0.0, 0.0, -INF, -INF], [0.0, -INF, 0.0, -INF])
    found = lens_compare(rows, rows, head, other)
    assert (found.kl.item(), found.reverse_kl.item()) == (INF, INF)
    np.testing.assert_allclose([found.js.item(), found.tv.item()], [np.log(2) / 2, 0.5], rtol=1e-6)


def test_predictions_with_nothing_in_common():
    rows, head, other = constant_heads([200.0, 0.0, -INF], [0.0, 200.0, -INF])
    found = lens_compare(rows, rows, head, other)
    np.testing.assert_allclose([found.kl.item(), found.reverse_kl.item()], [200, 200], rtol=1e-6)
    np.testing.assert_allclose([found.js.item(), found.tv.item()], [np.log(2), 1], rtol=1e-6)


def test_nan_stays_in_its_pair(rng):
    head, a, b = oracle.make_head(rng, V, D), rows_of(rng), rows_of(rng)
    whole = lens_compare(a, b, head)
    a[1, 2, 3] = mx.nan
    b[0, 4, 0] = mx.nan
    found = lens_compare(a, b, head)
    broken = np.zeros((L, N), bool)
    broken[1, 2] = broken[0, 4] = True
    for name in NAMES:
        values = oracle.wide(getattr(found, name))
        assert (np.isnan(values) == broken).all()
        np.testing.assert_allclose(values[~broken], oracle.wide(getattr(whole, name))[~broken], rtol=1e-6, atol=1e-7)


def test_no_layers(rng):
    head = oracle.make_head(rng, V, D)
    assert lens_compare(mx.zeros((0, N, D)), mx.zeros((1, N, D)), head).tv.shape == (0, N)


def test_wrong_arguments(rng):
    head, a = oracle.make_head(rng, V, D), rows_of(rng)
    for b in (a[:, :2], a[:2], a[..., :32], a[0]):
        with pytest.raises(ValueError, match=r"needs b \[3 or 1, 5, 64\]"):
            lens_compare(a, b, head)
    with pytest.raises(ValueError, match=r"needs a \[L, N, 64\] with N >= 1"):
        lens_compare(a[0], a, head)
    with pytest.raises(ValueError, match="one vocabulary, not 131 and 130 tokens"):
        lens_compare(a, a, head, oracle.make_head(rng, V - 1, D))


def test_the_head_is_read_twice(rng, monkeypatch):
    calls = []

    class Spy:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(extension(), name)

    monkeypatch.setattr(compare, "extension", Spy)
    head, a, b = oracle.make_head(rng, V, D, True), rows_of(rng), rows_of(rng, 1)
    with use_backend("native"):
        assert_expected(lens_compare(a, b, head), a, b, head)
    assert calls == ["lens_target", "lens_compare"]
