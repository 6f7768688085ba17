"""Test lens_compare's kernel in emulation: both kinds of pairs, two heads, chunks, extremes, small divergences, orders of execution."""

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from metalens.ops import Head, Weight, lens_compare
from metalens.ops.metal import tuning
from support import oracle
from support.metal_emulation import emulated, needs_clang

pytestmark = needs_clang

NAMES = ("kl", "reverse_kl", "js", "tv")
INF = float("inf")


def dense(rng, vocab, depth, **settings):
    """Return a float32 head, whose products are MLX's: only the kernel of the comparison is emulated."""
    return oracle.make_head(rng, vocab, depth, quantized=False, **settings)


def assert_expected(found, a, b, head, head_b=None, tolerance=2e-5):
    z_a, z_b = (oracle.head_logits(oracle.wide(rows), h)[..., : h.tokens] for rows, h in ((a, head), (b, head_b or head)))
    for name, expected in oracle.comparison(z_a, z_b).items():
        np.testing.assert_allclose(oracle.wide(getattr(found, name)), expected, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("one", [True, False], ids=["a row for all layers", "pairs"])
@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_chunks_in_every_order(rng, monkeypatch, schedule, one):
    monkeypatch.setattr(tuning, "chunk_rows", lambda *_: 7)
    head = dense(rng, 601, 8, bias=True, scale=1.5, padding=9, offset=1.0)  # more ids than a threadgroup has threads
    a, b = oracle.random_array(rng, 3, 5, 8), oracle.random_array(rng, 1 if one else 3, 5, 8)
    with emulated(), mslcpu.options(schedule=schedule, seed=2), mslcpu.recording() as reports:
        assert_expected(lens_compare(a, b, head), a, b, head)
    assert len(reports) > 1


def test_two_models_with_one_vocabulary(rng):
    head, head_b = dense(rng, 131 + 4, 8, padding=4), dense(rng, 131 + 9, 12, bias=True, softcap=5.0, padding=9, offset=2.0)
    a, b = oracle.random_array(rng, 2, 3, 8, dtype=mx.float16), oracle.random_array(rng, 1, 3, 12)
    with emulated():
        assert_expected(lens_compare(a, b, head, head_b), a, b, head, head_b)


@pytest.mark.parametrize("distance", [1e-3, 0.05, 0.3, 2.0])
def test_small_divergences_have_small_errors(rng, distance):
    head, a = dense(rng, 257, 64), oracle.random_array(rng, 2, 3, 64)
    b = a + oracle.random_array(rng, 2, 3, 64, scale=distance / 8)
    with emulated():
        found = lens_compare(a, b, head)
        values = {name: oracle.wide(getattr(found, name)) for name in NAMES}
    expected = oracle.comparison(*(oracle.head_logits(oracle.wide(rows), head) for rows in (a, b)))
    for name in ("kl", "reverse_kl", "js"):
        assert (np.abs(values[name] - expected[name]) <= 1e-11 + 3e-6 * np.sqrt(expected[name]) + 1e-6 * expected[name]).all(), name


def constant(*logits):
    """Return rows [1, 1, 2] and heads whose logits are always these."""
    return mx.zeros((1, 1, 2)), *(Head(Weight(mx.zeros((len(z), 2))), mx.array(z)) for z in logits)


@pytest.mark.parametrize("inexact", [False, True])
@pytest.mark.parametrize(
    ("z_a", "z_b", "expected"),
    [
        ([0.0, 0.0, -INF, -INF], [0.0, -INF, 0.0, -INF], (INF, INF, np.log(2) / 2, 0.5)),  # tokens that one side rules out
        ([200.0, 0.0, -INF], [0.0, 200.0, -INF], (200, 200, np.log(2), 1)),  # nothing in common
        ([0.0], [5.0], (0, 0, 0, 0)),  # a vocabulary of one token
        ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0], (0, 0, 0, 0)),
        ([-INF, -INF], [0.0, 0.0], (np.nan,) * 4),  # no prediction at all
    ],
)
def test_extremes(z_a, z_b, expected, inexact):
    rows, head, other = constant(z_a, z_b)
    with emulated(), mslcpu.options(inexact=inexact):
        found = lens_compare(rows, rows, head, other)
        values = [getattr(found, name).item() for name in NAMES]
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-12)


def test_nan_stays_in_its_pair(rng):
    head, a, b = dense(rng, 67, 8), oracle.random_array(rng, 2, 3, 8), oracle.random_array(rng, 2, 3, 8)
    a[1, 2, 3] = mx.nan
    b[0, 1, 0] = mx.nan
    with emulated():
        found = lens_compare(a, b, head)
        broken = {name: np.isnan(oracle.wide(getattr(found, name))) for name in NAMES}
    for name in NAMES:
        assert broken[name].tolist() == [[False, True, False], [False, False, True]], name
