from itertools import islice

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.training import TokenSequences


def take(sequences, count):
    return [s.reshape(-1).tolist() for s in islice(sequences, count)]


def test_sequences_follow_each_other_pass_after_pass():
    sequences = TokenSequences(mx.arange(12), 4)
    assert len(sequences) == 3
    assert take(sequences, 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_sequence_is_a_batch_of_one():
    ids = mx.arange(9, dtype=mx.int32)
    (sequence,) = islice(TokenSequences(ids, 4), 1)
    assert sequence.shape == (1, 4)
    assert sequence.dtype == mx.int32


def test_the_last_sequence_overlaps_so_that_the_tail_is_used():
    assert take(TokenSequences(mx.arange(10), 4), 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]


@given(length=st.integers(1, 20), extra=st.integers(0, 60), seed=st.sampled_from([None, 0, 1]))
def test_a_pass_uses_every_token_in_as_few_sequences_as_possible(length, extra, seed):
    tokens = length + extra
    sequences = TokenSequences(mx.arange(tokens), length, seed)
    one_pass = take(sequences, len(sequences))
    assert len(sequences) == -(-tokens // length)
    assert all(s == list(range(s[0], s[0] + length)) for s in one_pass)
    assert {t for s in one_pass for t in s} == set(range(tokens))


def test_a_text_of_one_sequence():
    assert take(TokenSequences(mx.arange(10), 10), 2) == [list(range(10))] * 2


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_text_that_is_too_short(tokens):
    with pytest.raises(ValueError, match=rf"{tokens} tokens, need at least 10"):
        TokenSequences(mx.arange(tokens), 10)


def test_a_seed_shuffles_reproducibly_and_anew_in_every_pass():
    ids = mx.arange(80)
    in_order = take(TokenSequences(ids, 4), 20)
    first = take(TokenSequences(ids, 4, seed=3), 40)
    assert first == take(TokenSequences(ids, 4, seed=3), 40)
    assert first != take(TokenSequences(ids, 4, seed=4), 40)
    one, two = first[:20], first[20:]
    assert sorted(one) == sorted(two) == in_order
    assert in_order != one != two != in_order


def test_every_iterator_starts_from_the_beginning():
    sequences = TokenSequences(mx.arange(80), 4, seed=3)
    assert take(sequences, 7) == take(sequences, 7)
