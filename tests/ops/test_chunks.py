"""The bound on the logits of the plain-MLX reference: it sets the number of tokens per chunk and changes nothing else."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import chunks


@pytest.fixture
def budget(monkeypatch):
    """Return a function that sets the allowed bytes of logits."""
    return lambda size: monkeypatch.setitem(chunks.LOGITS_BYTES, mx.DeviceType.cpu, size)


@pytest.mark.parametrize("layers", [0, 1, 4])
@pytest.mark.parametrize("vocab_size", [1, 1000, 10**9])
def test_a_chunk_keeps_within_the_budget_unless_it_is_one_token(budget, layers, vocab_size):
    budget(40_000)
    tokens = chunks.tokens_per_chunk(layers, vocab_size)
    assert tokens >= 1  # one token must go through, at any cost
    assert tokens == 1 or tokens * layers * vocab_size * 4 <= 40_000
    assert (tokens + 1) * max(layers, 1) * vocab_size * 4 > 40_000  # and not smaller than necessary


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("layers", [0, 1, 4])
@pytest.mark.parametrize("vocab_size", [1, 1000, 10**9])
def test_every_token_goes_through_once_and_in_order(budget, tokens, layers, vocab_size):
    budget(40_000)
    sizes = []

    def function(n, labels, nothing):
        assert nothing is None
        sizes.append(n.shape[1])
        return n[..., 0] + labels, n

    n, labels = mx.arange(layers * tokens * 2).reshape(layers, tokens, 2), mx.arange(tokens)
    sums, rows = chunks.in_chunks(function, n, [labels, None], vocab_size)
    assert mx.array_equal(sums, n[..., 0] + labels)
    assert mx.array_equal(rows, n)
    assert sum(sizes) == tokens
    assert max(sizes) <= chunks.tokens_per_chunk(layers, vocab_size)


def test_one_chunk_waits_for_the_one_before(budget):
    # Each chunk makes a row of 400 kB and reduces it to a number. Made together, they would peak at 64 rows. MLX schedules ten tasks ahead.
    budget(4)
    row = mx.ones(100_000)
    mx.eval(row)

    def function(n):
        return [mx.sum(mx.sin(n[..., None] + row), axis=-1)]

    def peak(tokens):
        n = mx.zeros((1, tokens))
        mx.eval(n)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(chunks.in_chunks(function, n, [], 1))
        return mx.get_peak_memory() - before

    one, many = peak(1), peak(64)
    assert one >= 400_000  # something was measured
    assert many < 20 * one


def test_nothing_is_evaluated(budget, monkeypatch):
    def refuse(*_):
        raise AssertionError("evaluated")

    budget(4)
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, refuse)
    (total,) = chunks.in_chunks(lambda n: [n + 1], mx.zeros((1, 3)), [], 1)
    monkeypatch.undo()
    assert np.array(total).tolist() == [[1, 1, 1]]
