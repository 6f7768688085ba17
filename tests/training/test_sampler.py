import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.training.config import HELD_BACK
from metalens.training.data import Corpus, NotEnoughDataError, Sampler, batches
from metalens.training.data.sampler import MOST_HELD


def packed(*sizes, prefix=()):
    """Documents of so many tokens, which are numbered through."""
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype("<u8")
    return Corpus(
        np.arange(bounds[-1], dtype="<u2"), bounds, "packed", prefix=prefix, about={"fingerprint": f"{sizes}", "content": "c", "tokenizer": None}
    )


def stream(tokens, prefix=()):
    return Corpus.from_ids(np.arange(tokens), prefix=prefix)


def epoch(sampler):
    return sampler.take_tokens(sampler.total_tokens)


def lists(sequences):
    return [s.tolist() for s in sequences]


def test_a_stream_is_cut_without_overlap_and_the_tail_is_short():
    sampler = Sampler(stream(10), 4)
    assert (len(sampler), sampler.total_tokens) == (3, 10)
    taken = epoch(sampler)
    assert lists(taken) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {s.dtype for s in taken} == {np.dtype(np.int32)}


def test_packed_sequences_end_with_their_document():
    assert lists(epoch(Sampler(packed(5, 0, 1, 4), 4))) == [[0, 1, 2, 3], [4], [5], [6, 7, 8, 9]]


def test_the_prefix_comes_before_every_sequence_and_counts():
    sampler = Sampler(packed(5, 1, prefix=(99,)), 4)
    assert sampler.total_tokens == 6 + 3
    assert lists(epoch(sampler)) == [[99, 0, 1, 2], [99, 3, 4], [99, 5]]
    assert lists(epoch(Sampler(stream(4, prefix=(99,)), 4))) == [[99, 0, 1, 2], [99, 3]]


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)
seeds = st.sampled_from([None, 0, 1, 2**40])


@st.composite
def samplers(draw, repeat=None):
    prefix = (999,) * draw(st.integers(0, 2))
    documents = draw(sizes)
    corpus = packed(*documents, prefix=prefix) if draw(st.booleans()) else stream(sum(documents), prefix=prefix)
    length, seed = draw(st.integers(len(prefix) + 1, 20)), draw(seeds)
    again = draw(st.booleans()) if repeat is None else repeat
    return lambda: Sampler(corpus, length, seed=seed, repeat=again)


@given(make=samplers(repeat=True), epochs=st.integers(1, 3))
def test_every_token_is_used_once_per_epoch(make, epochs):
    sampler = make()
    prefix = len(sampler.corpus.prefix)
    for _ in range(epochs):
        taken = epoch(sampler)
        assert len(taken) == len(sampler)
        assert all(prefix < s.size <= sampler.length and s[:prefix].tolist() == [999] * prefix for s in taken)
        bodies = [s[prefix:].tolist() for s in taken]
        assert all(b == list(range(b[0], b[0] + len(b))) for b in bodies)
        assert sorted(t for b in bodies for t in b) == list(range(sampler.corpus.tokens))
        if sampler.corpus.join == "packed":
            bounds = sampler.corpus.documents.astype(int)
            assert all(np.searchsorted(bounds, b[0], "right") == np.searchsorted(bounds, b[-1], "right") for b in bodies)


@given(make=samplers(repeat=True), tokens=st.integers(1, 60), before=st.integers(0, 12))
def test_going_on_from_any_point_is_as_if_nothing_had_happened(make, tokens, before):
    straight = make()
    for _ in range(before):
        straight.take_tokens(tokens)
    resumed = make()
    resumed.restore(json.loads(json.dumps(straight.state())))
    for _ in range(6):
        assert lists(straight.take_tokens(tokens)) == lists(resumed.take_tokens(tokens))
        assert straight.state() == resumed.state()


@given(make=samplers(repeat=True), tokens=st.integers(1, 60), world=st.integers(1, 5))
def test_ranks_share_the_same_step(make, tokens, world):
    alone, ranks = make(), [make() for _ in range(world)]
    for _ in range(4):
        step = alone.take_step(tokens)
        shares = [r.take_step(tokens, rank, world) for rank, r in enumerate(ranks)]
        assert [s.tokens for s in shares] == [step.tokens] * world == [sum(s.size for s in step.sequences)] * world
        assert [s.state for s in shares] == [step.state] * world
        together = sorted(s for share in shares for s in lists(share.sequences))
        assert together == sorted(lists(step.sequences))
        counts = [len(s.sequences) for s in shares]
        assert max(counts) - min(counts) <= 1


@given(make=samplers(), tokens=st.integers(1, 60))
def test_a_step_has_whole_sequences_and_no_more_than_it_needs(make, tokens):
    sampler = make()
    try:
        step = sampler.take_step(tokens)
    except NotEnoughDataError:
        assert not sampler.repeat
        assert sampler.total_tokens < tokens
    else:
        assert step.tokens >= tokens > step.tokens - step.sequences[-1].size


@given(make=samplers(repeat=False), tokens=st.integers(1, 40), before=st.integers(0, 3), steps=st.integers(1, 5))
def test_require_says_beforehand_what_will_happen(make, tokens, before, steps):
    sampler = make()
    for _ in range(before):
        if sampler.remaining_tokens() >= tokens:
            sampler.take_tokens(tokens)
    position = sampler.state()
    try:
        sampler.require(tokens, steps)
        enough = True
    except NotEnoughDataError:
        enough = False
    assert sampler.state() == position
    taken = 0
    try:
        for _ in range(steps):
            sampler.take_tokens(tokens)
            taken += 1
    except NotEnoughDataError:
        pass
    assert enough == (taken == steps)


def test_a_seed_shuffles_anew_in_every_epoch():
    def two(seed):
        sampler = Sampler(stream(80), 4, seed=seed, repeat=True)
        return lists(epoch(sampler)), lists(epoch(sampler))

    (first, second), (other, _), (ordered, again) = two(3), two(4), two(None)
    assert ordered == again == sorted(first) == sorted(second)
    assert len({str(x) for x in (first, second, other, ordered)}) == 4
    assert two(3) == (first, second)


def test_the_order_never_changes():
    # Checkpoints of older versions and other NumPys must go on with the same sequences.
    assert [s[0] for s in lists(epoch(Sampler(stream(12), 1, seed=7)))] == [6, 3, 11, 4, 10, 9, 0, 2, 8, 7, 5, 1]


def test_a_step_can_span_epochs():
    sampler = Sampler(stream(3), 1, repeat=True)
    assert lists(sampler.take_tokens(8)) == [[0], [1], [2], [0], [1], [2], [0], [1]]
    assert (sampler.epoch, sampler.index) == (2, 2)


def test_a_text_that_ends():
    sampler = Sampler(stream(10), 4)
    sampler.take_tokens(8)
    before = sampler.state()
    with pytest.raises(NotEnoughDataError, match=r"3 tokens are needed.*2 of 10 are left.*repeat=True"):
        sampler.take_tokens(3)
    assert sampler.state() == before
    assert lists(sampler.take_tokens(2)) == [[8, 9]]
    with pytest.raises(ValueError, match="0 of 10 are left"):
        sampler.take_tokens(1)


def test_require_names_the_numbers():
    sampler = Sampler(stream(10), 4)
    sampler.require(10)
    with pytest.raises(
        NotEnoughDataError, match=r"3 steps of at least 4 tokens, in whole sequences of up to 4 are needed \(12 tokens\), there are 10\."
    ):
        sampler.require(4, steps=3)
    Sampler(stream(10), 4, repeat=True).require(10**9)


def test_a_step_carries_the_position_after_it():
    sampler = Sampler(stream(10), 4)
    first, second = sampler.take_step(4), sampler.take_step(4)
    assert (lists(first.sequences), lists(second.sequences)) == ([[0, 1, 2, 3]], [[4, 5, 6, 7]])
    assert (first.state["index"], second.state["index"]) == (1, 2)
    with pytest.raises(NotEnoughDataError):
        sampler.take_step(4)


def test_a_position_in_other_data():
    state = Sampler(stream(80), 4, seed=1).state()
    for other, message in (
        (Sampler(stream(80), 5, seed=1), "length was 4 and is 5"),
        (Sampler(stream(80), 4, seed=2), "seed was 1 and is 2"),
        (Sampler(stream(80), 4), "seed was 1 and is None"),
        (Sampler(stream(81), 4, seed=1), "corpus fingerprint was .* and is .*; corpus content was .*; corpus tokens was 80 and is 81"),
    ):
        with pytest.raises(ValueError, match=message):
            other.restore(state)
        assert other.state()["index"] == 0


@pytest.mark.parametrize("places", [None, MOST_HELD + 1])
def test_a_position_beside_other_held_back_text(places):
    """Older versions held whole sequences back, and did not say so."""
    sampler = Sampler(stream(6000), 4, held_back=300)
    sampler.take_tokens(40)
    state = sampler.state()
    sampler.restore(state)
    del state["places"]
    with pytest.raises(ValueError, match=r"Another version of metalens made this checkpoint.* pieces\. .* with --from LENS .*, or start again\."):
        sampler.restore(state if places is None else state | {"places": places})
    assert sampler.state()["index"] == 10
    with pytest.raises(ValueError, match="held_back was 300 and is 0"):
        Sampler(stream(6000), 4).restore(sampler.state())


@pytest.mark.parametrize("change", [{"index": 21}, {"index": -1}, {"epoch": -1}, {"index": None}, {"corpus": 3}])
def test_states_that_are_none(change):
    sampler = Sampler(stream(80), 4)
    sampler.restore(sampler.state() | {"index": 20})
    with pytest.raises(ValueError, match="no position|not the state"):
        sampler.restore(sampler.state() | change)
    with pytest.raises(ValueError, match="not the state"):
        sampler.restore({})


def test_settings_are_checked():
    with pytest.raises(ValueError, match="no room for text"):
        Sampler(stream(5, prefix=(1, 2)), 2)
    with pytest.raises(ValueError, match="seed must not be negative"):
        Sampler(stream(5), 2, seed=-1)
    for arguments in ((0,), (1, 1, 1), (1, -1, 2), (1, 0, 0)):
        with pytest.raises(ValueError, match="rank"):
            Sampler(stream(5), 2).take_tokens(*arguments)


def test_numpy_s_integers_are_fine():
    state = Sampler(stream(5), np.int64(2), seed=np.int64(3)).state()
    assert json.loads(json.dumps(state)) == state


@given(sizes=st.lists(st.integers(1, 12), max_size=20), tokens=st.integers(1, 40))
def test_batches_hold_every_sequence_once(sizes, tokens):
    found = batches(sizes, tokens)
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    for batch in found:
        assert batch == sorted(batch)
        assert len({sizes[i] for i in batch}) == 1
        assert len(batch) == 1 or sum(sizes[i] for i in batch) <= tokens
    for size in set(sizes):
        of_size = [batch for batch in found if sizes[batch[0]] == size]
        assert len(of_size) == -(-sizes.count(size) // max(1, tokens // size))


def test_batches_keep_the_order():
    assert batches([2, 1, 2, 2], 4) == [[0, 2], [3], [1]]


@given(
    tokens=st.integers(1, 4000),
    length=st.integers(2, 130),
    held_back=st.integers(0, 600),
    prefix=st.lists(st.integers(0, 9), max_size=1),
    seed=st.none() | st.integers(0, 9),
    shift=st.sampled_from([0, 0, 1, -3, 200]),
)
def test_sequences_lie_around_what_is_held_back(tokens, length, held_back, prefix, seed, shift):
    """Every token of one text is in one sequence or in one piece that is held back. All sequences but one are full, so nothing else is left out."""
    sampler = Sampler(stream(tokens, prefix), length, seed=seed, held_back=held_back, shift=shift)
    held = sampler.held_back_step()
    trained = epoch(sampler)
    assert len(trained) == len(sampler)
    pieces = [sequence[len(prefix) :] for sequence in [*held.sequences, *trained]]
    if abs(shift) < length:  # else no token of a piece has a partner
        assert sorted(np.concatenate(pieces)) == list(range(tokens))
    assert all((np.diff(piece) == 1).all() for piece in pieces)
    assert all(list(sequence[: len(prefix)]) == prefix for sequence in [*held.sequences, *trained])
    assert sum(sequence.size < length for sequence in trained) <= 1
    assert held.tokens <= held_back
    assert len(held.sequences) <= -(-tokens // (length - len(prefix))) // HELD_BACK
    if held.sequences:
        assert len({sequence.size for sequence in held.sequences}) == 1
