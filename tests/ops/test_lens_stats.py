import mlx.core as mx
import numpy as np
import pytest

import oracle
from metalens.ops import Head, LensStats, Weight, chunks, lens_stats
from metalens.ops.lens_stats import top_k

pytestmark = pytest.mark.usefixtures("each_backend")

V, D, L, N = 131, 64, 3, 5
INF = float("inf")


def make_input(rng):
    """n [L, N, D] with layer 1 close to the model, n_model [N, D], labels [N]."""
    n, n_model = oracle.random_array(rng, L, N, D), oracle.random_array(rng, N, D)
    n[1] = n_model + oracle.random_array(rng, N, D, scale=0.05)
    return n, n_model, mx.array(rng.integers(0, V, N))


def head_of_logits(z):
    """A head and rows [1, N, D] whose logits are exactly `z` [N][V]: the rows of the identity pick the columns of U."""
    columns = mx.array(z, dtype=mx.float32)
    return mx.eye(columns.shape[0])[None], Head(Weight(mx.where(mx.isinf(columns), 0, columns).T))


def constant_head(z):
    """A head whose logits are `z` [V], -inf included, whatever the rows [1, N, 2]."""
    return mx.zeros((1, 2, 2)), Head(Weight(mx.zeros((len(z), 2))), mx.array(z))


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("quantised", [True, False])
def test_every_statistic(rng, quantised, settings):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D, quantised, **settings), make_input(rng)
    stats = lens_stats(n, head, 4, n_model, labels)
    z, z_model = (oracle.head_logits(oracle.wide(a), head) for a in (n, n_model))
    log_q = oracle.log_softmax(z)
    of_label = np.take_along_axis(log_q, np.array(labels)[None, :, None], axis=-1)
    expected = {
        "lse": (z - log_q)[..., 0],
        "entropy": oracle.entropy(z),
        "max_probability": np.exp(log_q).max(axis=-1),
        "kl": oracle.kl(z_model, z),
        "nll": -of_label[..., 0],
    }
    for name, values in expected.items():
        ours = getattr(stats, name)
        assert (ours.shape, ours.dtype) == ((L, N), mx.float32)
        np.testing.assert_allclose(oracle.wide(ours), values, atol=1e-5, err_msg=name)
    order = np.argsort(-z, axis=-1)[..., :4]
    assert (stats.top_ids.shape, stats.top_ids.dtype) == ((L, N, 4), mx.int32)
    np.testing.assert_array_equal(np.array(stats.top_ids), order)
    np.testing.assert_allclose(oracle.wide(stats.top_logits), np.take_along_axis(z, order, axis=-1), atol=2e-5)
    assert stats.agrees.dtype == mx.bool_
    np.testing.assert_array_equal(np.array(stats.agrees), z.argmax(-1) == z_model.argmax(-1))
    assert np.array(stats.agrees)[1].all()  # the close layer, so that the line above compares both values
    assert stats.rank.dtype == mx.int32
    np.testing.assert_array_equal(np.array(stats.rank), 1 + (log_q > of_label).sum(axis=-1))


def test_what_was_not_asked_for_is_none(rng):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    assert [getattr(lens_stats(n, head), name) for name in ("kl", "agrees", "nll", "rank")] == [None] * 4
    assert lens_stats(n, head, n_model=n_model).nll is None
    assert lens_stats(n, head, labels=labels).kl is None


@pytest.mark.parametrize("k", [1, 2, 64, V - 1, V])
def test_top_k_for_every_k(rng, k):
    head, (n, _, _) = oracle.make_head(rng, V, D, bias=True), make_input(rng)
    stats = lens_stats(n, head, k)
    assert stats.top_ids.shape == stats.top_logits.shape == (L, N, k)
    z = oracle.head_logits(oracle.wide(n), head)
    np.testing.assert_array_equal(np.array(stats.top_ids), np.argsort(-z, axis=-1)[..., :k])


@pytest.mark.parametrize("k", [-1, 0, V + 1])
def test_k_out_of_range(rng, k):
    with pytest.raises(ValueError, match=f"from 1 to {V}"):
        lens_stats(make_input(rng)[0], oracle.make_head(rng, V, D), k)


def test_equal_logits_are_ordered_by_id():
    z = [3.0, 1.0, 3.0, 2.0, -INF, 3.0, 2.0, -INF]
    n, head = constant_head(z)
    assert lens_stats(n, head, 8).top_ids[0, 0].tolist() == [0, 2, 5, 3, 6, 1, 4, 7]
    assert lens_stats(n, head, 3).top_ids[0, 1].tolist() == [0, 2, 5]
    assert lens_stats(n, head, 1).top_ids[0, 0].tolist() == [0]
    # At the k-th place any of the equals may stand, but the ones named are in order and really the best.
    ids, logits = top_k(mx.array([z]), 4)
    assert ids[0, :3].tolist() == [0, 2, 5]
    assert ids[0, 3].item() in (3, 6)
    assert logits.tolist() == [[3.0, 3.0, 3.0, 2.0]]


def test_all_logits_equal():
    n, head = constant_head([0.25] * 300)  # more than one vector's worth, so that an unstable sort would show
    stats = lens_stats(n, head, 300, labels=mx.array([299, 0]))
    assert stats.top_ids[0, 0].tolist() == list(range(300))
    assert stats.rank.tolist() == [[1, 1]]  # nothing is more likely
    np.testing.assert_allclose(oracle.wide(stats.entropy), np.log(300), atol=1e-5)


def test_ranks_count_what_is_strictly_more_likely():
    n, head = head_of_logits([[1.0, 5.0, 5.0, 7.0]] * 4)
    stats = lens_stats(n, head, labels=mx.array([3, 2, 1, 0]))
    assert stats.rank.tolist() == [[1, 2, 2, 4]]


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


def test_a_certain_row():
    n, head = constant_head([500.0, 0.0, -500.0])
    stats = lens_stats(n, head, labels=mx.array([0, 2]))
    assert stats.entropy.tolist() == [[0.0, 0.0]]
    assert stats.max_probability.tolist() == [[1.0, 1.0]]
    assert stats.nll.tolist() == [[0.0, 1000.0]]


@pytest.mark.parametrize("budget", [1, 4 * V * L * 2, 4 * V * L * N - 1])
def test_chunks_change_nothing(rng, monkeypatch, budget):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D, bias=True), make_input(rng)
    whole = vars(lens_stats(n, head, 5, n_model, labels))
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, budget)
    assert len(list(chunks.token_chunks(N, L, V))) > 1
    for name, ours in vars(lens_stats(n, head, 5, n_model, labels)).items():
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(whole[name]), atol=2e-6, err_msg=name)


def test_vocabulary_beyond_16_bits(rng):
    head = Head(oracle.random_weight(rng, 66001, 32, scale=0.2))
    n = oracle.random_array(rng, 1, 2, 32)
    z = oracle.head_logits(oracle.wide(n), head)
    order = np.argsort(-z, axis=-1)
    labels = mx.array([65999, int(order[0, 1, 65990])])  # ids and a rank that 16 bits do not hold
    stats = lens_stats(n, head, 3, labels=labels)
    np.testing.assert_array_equal(np.array(stats.top_ids), order[..., :3])
    of_label = np.take_along_axis(z, np.array(labels)[None, :, None], axis=-1)
    # Logits closer to the label's than float32 resolves may fall on either side.
    assert np.abs(np.array(stats.rank) - 1 - (z > of_label).sum(axis=-1)).max() <= (np.abs(z - of_label) < 2e-5).sum(axis=-1).max()
    assert stats.rank[0, 1].item() > 65900
    np.testing.assert_allclose(
        oracle.wide(stats.nll), -np.take_along_axis(oracle.log_softmax(z), np.array(labels)[None, :, None], -1)[..., 0], atol=2e-5
    )


@pytest.mark.parametrize("top", [0.0, 1.0, 4.0])
def test_sums_over_many_equal_tokens(top):
    # A row of zeros, or a head with dead rows, gives V equal terms, whose rounding errors all point the same way: added up one by one in float32, the
    # hundred-thousandth is off by far more than the first.
    z = [top] + [0.0] * 128_255
    n, head = constant_head(z)
    stats = lens_stats(n, head, labels=mx.array([0, 5]))
    log_q = oracle.log_softmax(np.array(z))
    np.testing.assert_allclose(oracle.wide(stats.lse), top - log_q[0], rtol=1e-5)
    np.testing.assert_allclose(oracle.wide(stats.nll), [-log_q[[0, 5]]], rtol=1e-5)
    np.testing.assert_allclose(oracle.wide(stats.entropy), oracle.entropy(np.array(z)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_of_16_bits_give_statistics_of_32(rng, dtype):
    head, n = oracle.make_head(rng, V, D), make_input(rng)[0].astype(dtype)
    stats = lens_stats(n, head)
    assert stats.entropy.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(stats.entropy), oracle.entropy(oracle.head_logits(oracle.wide(n), head)), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": mx.zeros((N, D))}, "lens_stats needs"),
        ({"n": mx.zeros((L, N, D + 1))}, "lens_stats needs"),
        ({"n": mx.zeros((L, 0, D))}, "N >= 1"),
        ({"n_model": mx.zeros((N + 1, D))}, "n_model"),
        ({"n_model": mx.zeros((L, N, D))}, "n_model"),
        ({"labels": mx.zeros((N + 1,), dtype=mx.int32)}, "labels"),
        ({"labels": mx.zeros((L, N), dtype=mx.int32)}, "labels"),
    ],
)
def test_shapes_that_do_not_fit(rng, change, message):
    with pytest.raises(ValueError, match=message):
        lens_stats(**{"n": mx.zeros((L, N, D)), "head": oracle.make_head(rng, V, D)} | change)


def test_statistics_are_evaluated(rng, monkeypatch):
    # One chunk's logits must be gone before the next chunk's are made: nothing lazy may hold on to them.
    evaluated = []
    monkeypatch.setattr(mx, "eval", lambda *args, kept=mx.eval: (evaluated.append(args), kept(*args))[1])
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, 1)
    assert isinstance(lens_stats(make_input(rng)[0], oracle.make_head(rng, V, D)), LensStats)
    assert len(evaluated) == N
