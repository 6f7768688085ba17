"""lens_stats: values for every head and size; top-k and ranks; arguments."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, LensStats, Weight, chunks, lens_stats
from metalens.ops.stats import largest_logits
from support import oracle

pytestmark = pytest.mark.usefixtures("each_backend")

V, D, L, N = 131, 64, 3, 5
INF = float("inf")
# Tolerance of float32 sums of logits of size 1 to 10.
ABSOLUTE = 2e-5


def make_input(rng, layers=L, tokens=N, width=D, vocab_size=V):
    """Make n [L, N, D] with the last layer close to the model, n_model [N, D] and labels [N]."""
    n, n_model = oracle.random_array(rng, layers, tokens, width), oracle.random_array(rng, tokens, width)
    n[-1] = n_model + oracle.random_array(rng, tokens, width, scale=0.05)
    return n, n_model, mx.array(rng.integers(0, vocab_size, tokens))


def head_of_logits(z):
    """Make rows [1, N, D] and a head whose logits are exactly `z` [N][V]: the rows of the identity select the columns of U."""
    columns = mx.array(z, dtype=mx.float32)
    return mx.eye(columns.shape[0])[None], Head(Weight(columns.T))


def constant_head(z):
    """Make rows [1, N, 2] and a head whose logits are always `z` [V], -inf included."""
    return mx.zeros((1, 2, 2)), Head(Weight(mx.zeros((len(z), 2))), mx.array(z))


def assert_expected(stats, n, head, k, n_model, labels):
    """Compare every statistic with float64: ids and ranks exactly, except for logits that float32 can't distinguish."""
    z, z_model = (oracle.head_logits(oracle.wide(a), head) for a in (n, n_model))
    log_q = oracle.log_softmax(z)
    ids = np.broadcast_to(np.array(labels)[None, :, None], (*z.shape[:2], 1))
    known = ((ids >= 0) & (ids < head.tokens))[..., 0]
    safe = np.where(known[..., None], ids, 0)
    z_label = np.take_along_axis(z, safe, axis=-1)
    best = z.max(axis=-1)
    expected = {
        "lse": best - log_q.max(axis=-1),
        "entropy": oracle.entropy(z),
        "max_probability": np.exp(log_q).max(axis=-1),
        "kl": oracle.kl(z_model, z),
        "nll": np.where(known, -np.take_along_axis(log_q, safe, axis=-1)[..., 0], np.nan),
    }
    for name, values in expected.items():
        ours = getattr(stats, name)
        assert (ours.shape, ours.dtype) == (z.shape[:2], mx.float32)
        np.testing.assert_allclose(oracle.wide(ours), values, atol=ABSOLUTE, rtol=ABSOLUTE, err_msg=name)

    assert (stats.top_ids.shape, stats.top_ids.dtype) == ((*z.shape[:2], k), mx.int32)
    assert (stats.top_logits.shape, stats.top_logits.dtype) == ((*z.shape[:2], k), mx.float32)
    top_ids = np.array(stats.top_ids)
    assert ((top_ids >= 0) & (top_ids < head.tokens)).all()
    assert all(len(set(row)) == k for row in top_ids.reshape(-1, k))
    of_ids = np.take_along_axis(z, top_ids, axis=-1)
    np.testing.assert_allclose(of_ids, -np.sort(-z, axis=-1)[..., :k], atol=ABSOLUTE)  # the best ones, in order
    np.testing.assert_allclose(oracle.wide(stats.top_logits), of_ids, atol=ABSOLUTE)

    margin = np.sort(z, axis=-1)[..., -2:] if head.tokens > 1 else np.stack([best - 1, best], axis=-1)
    clear = margin[..., 1] - margin[..., 0] > ABSOLUTE
    assert stats.agrees.dtype == mx.bool_
    assert (np.array(stats.agrees) == (z.argmax(-1) == z_model.argmax(-1)))[clear].all()
    rank, above = np.array(stats.rank), (z > z_label).sum(axis=-1)
    assert (stats.rank.shape, stats.rank.dtype) == (z.shape[:2], mx.int32)
    assert (rank[~known] == -1).all()
    close = (np.abs(z - z_label) < ABSOLUTE).sum(axis=-1) - 1
    assert (np.abs(rank - 1 - above) <= close)[known].all()


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("quantized", [True, False])
def test_every_statistic(rng, quantized, settings):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D, quantized, **settings), make_input(rng)
    stats = lens_stats(n, head, 4, n_model, labels)
    assert isinstance(stats, LensStats)
    assert_expected(stats, n, head, 4, n_model, labels)
    assert np.array(stats.agrees)[-1].mean() > 0.5  # in the close layer, so that both values are compared


@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_heads_of_the_8_bit_scaled_formats(rng, mode):
    head = Head(Weight(*mx.quantize(oracle.random_array(rng, V, D, scale=0.2), mode=mode), None, *reversed(oracle.FLOAT_MODES[mode]), mode))
    n, n_model, labels = make_input(rng)
    assert_expected(lens_stats(n, head, 4, n_model, labels), n, head, 4, n_model, labels)


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize("k", [1, 10, None])
def test_vocabularies_around_a_block_and_every_kind_of_k(rng, vocab_size, k):
    k = min(k or vocab_size, vocab_size)
    head, (n, n_model, labels) = oracle.make_head(rng, vocab_size, 32, bias=True), make_input(rng, width=32, vocab_size=vocab_size)
    assert_expected(lens_stats(n, head, k, n_model, labels), n, head, k, n_model, labels)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (3, 1), (1, 4), (300, 1), (300, 2), (2, 300), (100, 5)])
def test_more_rows_than_a_block_holds_and_fewer(rng, layers, tokens):
    head, (n, n_model, labels) = oracle.make_head(rng, V, 32), make_input(rng, layers, tokens, 32)
    assert_expected(lens_stats(n, head, 3, n_model, labels), n, head, 3, n_model, labels)


@pytest.mark.parametrize("tokens", [1, 3])  # with two layers and the model: few enough for the kernels for few rows, and too many
def test_vocabulary_beyond_16_bits(rng, tokens):
    head, (n, n_model, labels) = oracle.make_head(rng, 70_001, 32), make_input(rng, 2, tokens, 32)
    labels[0] = 69_998
    labels[-1] = int(oracle.head_logits(oracle.wide(n), head)[0, -1].argsort()[20])  # an id and a rank that do not fit into 16 bits
    stats = lens_stats(n, head, 3, n_model, labels)
    assert stats.rank[0, -1].item() > 69_900
    assert_expected(stats, n, head, 3, n_model, labels)


def test_what_was_not_asked_for_is_none(rng):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    assert [getattr(lens_stats(n, head), name) for name in ("kl", "agrees", "nll", "rank")] == [None] * 4
    assert lens_stats(n, head, n_model=n_model).nll is None
    assert lens_stats(n, head, labels=labels).kl is None


@pytest.mark.parametrize("asked", [(), ("n_model",), ("labels",), ("n_model", "labels")], ids=str)  # no sets: xdist compares names between processes
def test_what_else_is_asked_for_changes_nothing(rng, asked):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    whole = lens_stats(n, head, 2, n_model, labels)
    part = lens_stats(n, head, 2, **{name: value for name, value in (("n_model", n_model), ("labels", labels)) if name in asked})
    for name, ours in oracle.present(part).items():
        if ours is not None:
            np.testing.assert_allclose(oracle.wide(ours), oracle.wide(getattr(whole, name)), atol=ABSOLUTE, err_msg=name)


# ---------------------------------------------------------------------- top-k and ranks


@pytest.mark.parametrize("k", [1, 2, 64, V - 1, V])
def test_top_k_for_every_k(rng, k):
    head, (n, _, _) = oracle.make_head(rng, V, D, bias=True), make_input(rng)
    stats = lens_stats(n, head, k)
    assert stats.top_ids.shape == stats.top_logits.shape == (L, N, k)
    z = oracle.head_logits(oracle.wide(n), head)
    np.testing.assert_array_equal(np.array(stats.top_ids), np.argsort(-z, axis=-1)[..., :k])


def test_equal_logits_are_ordered_by_id():
    z = [3.0, 1.0, 3.0, 2.0, -INF, 3.0, 2.0, -INF]
    n, head = constant_head(z)
    assert lens_stats(n, head, 8).top_ids[0, 0].tolist() == [0, 2, 5, 3, 6, 1, 4, 7]
    assert lens_stats(n, head, 3).top_ids[0, 1].tolist() == [0, 2, 5]
    assert lens_stats(n, head, 1).top_ids[0, 0].tolist() == [0]
    # Any of the equal tokens may be the last one, but the returned ones are in order and really the largest.
    ids, logits = largest_logits(mx.array([z]), 4)
    assert ids[0, :3].tolist() == [0, 2, 5]
    assert ids[0, 3].item() in (3, 6)
    assert logits.tolist() == [[3.0, 3.0, 3.0, 2.0]]


@pytest.mark.parametrize("rows", [1, 7])
def test_equal_rows_of_the_head_give_equal_logits(rng, rows, each_backend):
    # The block, panel, vector or thread of a row must not matter: else ids are out of order, and a rank counts tokens that are only equally likely.
    places = [0, 1, 7, 8, 100, 255, 256, 300, 511, 512, 777, 1001]
    u = oracle.random_array(rng, 1003, 96, scale=0.02)
    u[mx.array(places)] = 3 * oracle.random_array(rng, 1, 96)
    n = oracle.random_array(rng, 1, rows, 96)
    labels = places[::5] if each_backend == "metal-emulated" else places  # the emulation takes seconds for each
    for weight in (Weight(u), Weight(*mx.quantize(u, 32, 4), 32, 4), Weight(*mx.quantize(u, mode="mxfp8"), None, 32, 8, "mxfp8")):
        for settings in oracle.HEADS.values():
            head = Head(weight, **{name: value for name, value in settings.items() if name not in ("bias", "padding", "offset")})
            z = oracle.head_logits(oracle.wide(n), head)[..., places[0]]
            stats = [lens_stats(n, head, len(places), n[0], mx.full((rows,), label)) for label in labels]
            first = stats[0]
            for ours in stats[1:]:
                assert mx.array_equal(ours.rank, first.rank)
                assert mx.array_equal(ours.nll, first.nll)
            for row in range(rows):
                if first.rank[0, row].item() == 1:  # the equal tokens are the most likely
                    assert first.top_ids[0, row].tolist() == places
                    np.testing.assert_allclose(oracle.wide(first.top_logits[0, row]), z[0, row], atol=ABSOLUTE)
            assert np.array(first.agrees).all()


def test_all_logits_equal():
    n, head = constant_head([0.25] * 300)  # more than one vector, so that an unstable sort would show
    stats = lens_stats(n, head, 300, labels=mx.array([299, 0]))
    assert stats.top_ids[0, 0].tolist() == list(range(300))
    assert stats.rank.tolist() == [[1, 1]]  # nothing is more likely
    np.testing.assert_allclose(oracle.wide(stats.entropy), np.log(300), atol=1e-5)


def test_ranks_count_what_is_strictly_more_likely():
    n, head = head_of_logits([[1.0, 5.0, 5.0, 7.0]] * 4)
    stats = lens_stats(n, head, labels=mx.array([3, 2, 1, 0]))
    assert stats.rank.tolist() == [[1, 2, 2, 4]]


LABELS = {
    "int64 beyond 32 bits": [2**32, 2**32 + 3, 2**40, 5, -(2**32) + 1],
    "int32": [V, -1, 2**31 - 1, V - 1, -(2**31)],
    "int16": [V, -1, 300, 0, 1],
    "uint8": [V, 255, 0, 130, 200],
    "uint32": [V, 2**32 - 1, 2**31, 130, 0],
    "uint64": [V, 2**64 - 1, 2**32, 130, 0],
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_tokens_have_nan_and_minus_one(rng, name):
    head, (n, n_model, _) = oracle.make_head(rng, V, D), make_input(rng)
    labels = mx.array(np.array(LABELS[name], dtype=name.split()[0]))
    stats = lens_stats(n, head, 2, n_model, labels)
    known = [0 <= label < V for label in LABELS[name]]
    assert (~np.isnan(oracle.wide(stats.nll))).tolist() == [known] * L
    assert (np.array(stats.rank) > 0).tolist() == [known] * L
    assert_expected(stats, n, head, 2, n_model, mx.array([label if k else -1 for label, k in zip(LABELS[name], known, strict=True)]))


def test_labels_of_a_small_type_in_a_large_vocabulary(rng):
    # 300 does not fit into uint8, but every uint8 is a token.
    head, (n, n_model, _) = oracle.make_head(rng, 300, D), make_input(rng)
    labels = mx.array([0, 44, 45, 255, 43], dtype=mx.uint8)
    assert_expected(lens_stats(n, head, 1, n_model, labels), n, head, 1, n_model, labels)


# ---------------------------------------------------------------------- padding, chunks, types


def test_padding_rows_are_never_named_and_weigh_nothing(rng):
    u = oracle.random_array(rng, 300, D, scale=0.2)
    u[260:] = 50 * u[260:]  # without the mask these would be the largest
    head, (n, n_model, _) = Head(Weight(u), used_rows=260), make_input(rng)
    labels = mx.array([0, 259, 260, 299, 300])
    stats = lens_stats(n, head, 260, n_model, labels)
    assert_expected(stats, n, head, 260, n_model, labels)
    assert mx.max(stats.top_ids).item() == 259
    rest = lens_stats(n, Head(Weight(u[:260])), 260, n_model, labels)
    for name, ours in oracle.present(stats).items():
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(getattr(rest, name)), atol=ABSOLUTE, err_msg=name)


@pytest.mark.parametrize("budget", [1, 4 * V * L * 2, 4 * V * L * N - 1])
def test_chunks_change_nothing(rng, monkeypatch, budget):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D, bias=True), make_input(rng)
    whole = oracle.present(lens_stats(n, head, 5, n_model, labels))
    monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, budget)
    assert chunks.tokens_per_chunk(L, V) < N
    for name, ours in oracle.present(lens_stats(n, head, 5, n_model, labels)).items():
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(whole[name]), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_of_16_bits_give_statistics_of_32(rng, dtype):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    n, n_model = n.astype(dtype), n_model.astype(dtype)
    assert_expected(lens_stats(n, head, 2, n_model, labels), n, head, 2, n_model, labels)


def test_no_layers(rng):
    head, (_, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    stats = lens_stats(mx.zeros((0, N, D)), head, 2, n_model, labels)
    mx.eval(*oracle.present(stats).values())
    assert {name: value.shape for name, value in oracle.present(stats).items()} == {
        name: (0, N, 2) if name.startswith("top") else (0, N) for name in oracle.present(stats)
    }


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(("k", "settings", "most"), [(-1, {}, V), (0, {}, V), (V + 1, {}, V), (101, {"used_rows": 100}, 100)])
def test_k_out_of_range(rng, k, settings, most):
    with pytest.raises(ValueError, match=f"from 1 to {most}"):
        lens_stats(make_input(rng)[0], oracle.make_head(rng, V, D, **settings), k)


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
        ({"labels": mx.zeros((N,))}, "token ids"),
        ({"labels": mx.zeros((N,), dtype=mx.bool_)}, "token ids"),
    ],
)
def test_shapes_that_do_not_fit(rng, change, message):
    with pytest.raises(ValueError, match=message):
        lens_stats(**{"n": mx.zeros((L, N, D)), "head": oracle.make_head(rng, V, D)} | change)
