"""lens_stats of logits that are huge, equal, -inf or NaN."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, Weight, lens_stats
from support import oracle

pytestmark = pytest.mark.usefixtures("each_backend")

V, D, L, N = 131, 64, 3, 5
INF = float("inf")
FLOATS = ("lse", "entropy", "max_probability", "top_logits", "kl", "nll")


def make_input(rng):
    return oracle.random_array(rng, L, N, D), oracle.random_array(rng, N, D), mx.array(rng.integers(0, V, N))


def constant_head(z):
    """Make rows [1, N, 2] and a head whose logits are always `z` [V], -inf included."""
    return mx.zeros((1, 2, 2)), Head(Weight(mx.zeros((len(z), 2))), mx.array(z))


def test_tokens_that_the_head_rules_out():
    n, head = constant_head([1.0, -INF, 2.0, -INF])
    stats = lens_stats(n, head, 2, mx.zeros((2, 2)), mx.array([2, 1]))
    p = oracle.softmax(np.array([1.0, 2.0]))
    np.testing.assert_allclose(oracle.wide(stats.entropy), -np.sum(p * np.log(p)), rtol=1e-6)
    np.testing.assert_allclose(oracle.wide(stats.kl), 0, atol=1e-7)
    assert stats.top_ids[0, 0].tolist() == [2, 0]
    assert stats.nll[0, 0].item() == pytest.approx(-np.log(p[1]), rel=1e-6)
    assert stats.nll[0, 1].item() == INF
    assert stats.rank.tolist() == [[1, 3]]


@pytest.mark.parametrize("possible", [0, 255, 256, 511, 512, 999])
def test_only_one_token_is_possible(possible):
    # Whole blocks of the vocabulary without a finite logit, before and after the only possible token.
    z = [-INF] * 1000
    z[possible] = 3.0
    n, head = constant_head(z)
    stats = lens_stats(n, head, 3, mx.zeros((2, 2)), mx.array([possible, (possible + 1) % 1000]))
    assert stats.lse.tolist() == [[3.0, 3.0]]
    assert stats.entropy.tolist() == stats.kl.tolist() == [[0.0, 0.0]]
    assert stats.max_probability.tolist() == [[1.0, 1.0]]
    assert stats.top_ids[0, :, 0].tolist() == [possible] * 2
    assert stats.top_logits[0, 0].tolist() == [3.0, -INF, -INF]
    assert stats.agrees.tolist() == [[True, True]]
    assert stats.nll.tolist() == [[0.0, INF]]
    assert stats.rank.tolist() == [[1, 2]]


def test_a_certain_row():
    n, head = constant_head([500.0, 0.0, -500.0])
    stats = lens_stats(n, head, labels=mx.array([0, 2]))
    assert stats.entropy.tolist() == [[0.0, 0.0]]
    assert stats.max_probability.tolist() == [[1.0, 1.0]]
    assert stats.nll.tolist() == [[0.0, 1000.0]]


@pytest.mark.parametrize("top", [0.0, 1.0, 4.0])
def test_sums_over_many_equal_tokens(top):
    # A row of zeros, or a head with dead rows, gives V equal terms, whose rounding errors have the same sign. Added one by one in float32, the
    # hundred-thousandth is off by far more than the first.
    z = [top] + [0.0] * 128_255
    n, head = constant_head(z)
    stats = lens_stats(n, head, labels=mx.array([0, 5]))
    log_q = oracle.log_softmax(np.array(z))
    np.testing.assert_allclose(oracle.wide(stats.lse), top - log_q[0], rtol=1e-5)
    np.testing.assert_allclose(oracle.wide(stats.nll), [-log_q[[0, 5]]], rtol=1e-5)
    np.testing.assert_allclose(oracle.wide(stats.entropy), oracle.entropy(np.array(z)), rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3e4])
def test_logits_of_tens_of_thousands(rng, softcap):
    head = Head(oracle.random_weight(rng, V, D), oracle.random_array(rng, V), scale=1000.0, softcap=softcap)
    n, n_model, labels = make_input(rng)
    z, z_model = (oracle.head_logits(oracle.wide(a), head) for a in (n, n_model))
    assert np.abs(z).max() > 1e4
    stats = lens_stats(n, head, 3, n_model, labels)
    # Such logits have rounding errors of 1e-3 to 1e-2.
    log_q = oracle.log_softmax(z)
    of_label = np.take_along_axis(log_q, np.array(labels)[None, :, None], axis=-1)[..., 0]
    np.testing.assert_allclose(oracle.wide(stats.lse), z.max(-1) - log_q.max(-1), rtol=1e-5)
    np.testing.assert_allclose(oracle.wide(stats.kl), oracle.kl(z_model, z), rtol=1e-5, atol=0.1)
    np.testing.assert_allclose(oracle.wide(stats.nll), -of_label, rtol=1e-5, atol=0.1)
    np.testing.assert_allclose(oracle.wide(stats.entropy), oracle.entropy(z), atol=0.1)
    np.testing.assert_allclose(oracle.wide(stats.max_probability), np.exp(log_q).max(-1), atol=0.1)


def test_logits_beyond_the_range_of_exp_in_either_direction():
    for shift in (-1e4, 1e4):
        n, head = constant_head([shift, shift + 1, shift - 100, shift + 2])
        stats = lens_stats(n, head, 4, mx.zeros((2, 2)), mx.array([0, 2]))
        expected = oracle.log_softmax(np.array([0.0, 1, -100, 2]))
        np.testing.assert_allclose(oracle.wide(stats.nll), [-expected[[0, 2]]], atol=2e-3)  # 1e4 has steps of 1e-3
        np.testing.assert_allclose(oracle.wide(stats.entropy), oracle.entropy(np.array([0.0, 1, -100, 2])), atol=2e-3)
        assert stats.top_ids[0, 0].tolist() == [3, 1, 0, 2]


def clean_and_spoiled(rng, head, spoil):
    n, n_model, labels = make_input(rng)
    clean = oracle.present(lens_stats(n, head, 3, n_model, labels))
    spoil(n, n_model)
    return clean, oracle.present(lens_stats(n, head, 3, n_model, labels))


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF], ids=str)
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_a_bad_row_stays_alone(rng, settings, bad):
    def spoil(n, _):
        n[1, 2, 7] = bad

    clean, spoiled = clean_and_spoiled(rng, oracle.make_head(rng, V, D, **settings), spoil)
    for name, value in spoiled.items():
        ours, expected = oracle.wide(value), oracle.wide(clean[name])
        if np.isnan(bad) and name in FLOATS:
            assert np.isnan(ours[1, 2]).all(), name
        ours[1, 2] = expected[1, 2]
        np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_ids_of_a_row_of_nan_are_tokens_and_it_agrees_with_nothing(rng, settings):
    head = oracle.make_head(rng, V, D, **settings)

    def spoil(n, n_model):
        n[1, 2] = float("nan")

    _, spoiled = clean_and_spoiled(rng, head, spoil)
    ids = spoiled["top_ids"][1, 2].tolist()
    assert len(set(ids)) == 3
    assert all(0 <= i < head.tokens for i in ids)
    assert not spoiled["agrees"][1, 2].item()


def test_a_bad_row_of_the_model_spoils_only_what_is_compared_with_it(rng):
    def spoil(_, n_model):
        n_model[2, 7] = float("nan")

    clean, spoiled = clean_and_spoiled(rng, oracle.make_head(rng, V, D, bias=True), spoil)
    for name, value in spoiled.items():
        ours, expected = oracle.wide(value), oracle.wide(clean[name])
        if name == "kl":
            assert np.isnan(ours[:, 2]).all()
        if name in ("kl", "agrees"):
            ours[:, 2] = expected[:, 2]
        np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=name)


def test_a_damaged_row_of_the_head_spoils_every_row_but_crashes_nothing(rng):
    u = oracle.random_array(rng, V, D, scale=0.2)
    u[50, 3] = float("nan")
    n, n_model, labels = make_input(rng)
    stats = lens_stats(n, Head(Weight(u)), V, n_model, labels)
    assert np.isnan(oracle.wide(stats.lse)).all()
    assert ((np.array(stats.top_ids) >= 0) & (np.array(stats.top_ids) < V)).all()
