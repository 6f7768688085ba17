"""Several short steps in one forward pass: the same streams, the same order, the same place in the text. And tokens that are shuffled among steps."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from metalens.models.capture import HiddenStates, ResidualCapture, joined
from metalens.models.layers import EMBEDDING
from metalens.training import CheckpointFolder, Corpus, TrainingConfig, TrainingInterruptedError, batching, train_loop
from metalens.training.batching import BatchedCapture, dealt, step_groups, steps_together
from metalens.training.data import Sampler, Step

LENGTH, VOCAB = 16, 131


def config(steps, tokens=LENGTH, length=LENGTH):
    return TrainingConfig(num_steps=steps, max_seq_len=length, tokens_per_step=tokens)


def lists(steps):
    return [[sequence.tolist() for sequence in step.sequences] for step in steps]


def sampler(tokens=150):
    """Nine sequences and a shorter one in an epoch, shuffled."""
    return Sampler(Corpus.from_ids(np.arange(tokens) % VOCAB), LENGTH, seed=1, repeat=True)


def flat(stream, layer):
    return np.array(stream.rows(layer))


@pytest.fixture
def passes(monkeypatch):
    """The shapes of the ids that go through the model."""
    original, seen = ResidualCapture.capture, []

    def noted(self, ids, *others, **options):
        seen.append(ids.shape)
        return original(self, ids, *others, **options)

    monkeypatch.setattr(ResidualCapture, "capture", noted)
    return seen


@pytest.mark.parametrize(
    ("tokens", "length", "together"), [(16, 16, 32), (20, 16, 32), (128, 128, 4), (384, 128, 1), (512, 64, 1), (2048, 2048, 1), (None, 100, 5)]
)
def test_as_many_steps_as_fit_a_pass(tokens, length, together):
    assert steps_together(config(9, tokens, length)) == together


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_every_step_gets_its_own_streams(tiny, passes, per_step):
    """Whatever the lengths: a step's shorter sequence goes through the model in another pass."""
    source = sampler()
    steps = [source.take_step(per_step * LENGTH) for _ in range(8)]
    assert len({sequence.size for step in steps for sequence in step.sequences}) == 2
    found = [list(streams) for streams in BatchedCapture(tiny.source, VOCAB).by_step(steps)]
    assert len(passes) == len({shape[1] for shape in passes})
    assert len(found) == 8
    for step, streams in zip(steps, found, strict=True):
        alone = {length: [s for s in step.sequences if s.size == length] for length in {s.size for s in step.sequences}}
        assert sorted(stream.hidden[0].shape[1] for stream in streams) == sorted(alone)
        for stream in streams:
            expected = tiny.source.capture(mx.array(np.stack(alone[stream.hidden[0].shape[1]])))
            for layer in range(len(tiny.source)):
                np.testing.assert_allclose(flat(stream, layer), flat(expected, layer), atol=1e-5)


def test_one_step_s_passes_are_computed_when_they_are_asked_for(tiny, passes, monkeypatch):
    monkeypatch.setattr(batching, "PASS_TOKENS", 2 * LENGTH)
    (streams,) = BatchedCapture(tiny.source, VOCAB).by_step([Step([np.arange(LENGTH, dtype=np.int32)] * 4, 4 * LENGTH, {})])
    assert not passes
    next(iter(streams))
    assert passes == [(2, LENGTH)]


def test_a_share_of_a_step_may_be_empty(tiny):
    steps = [Step([], LENGTH, {}), Step([np.arange(5, dtype=np.int32)], LENGTH, {}), Step([], LENGTH, {})]
    assert [len(list(streams)) for streams in BatchedCapture(tiny.source, VOCAB).by_step(steps)] == [0, 1, 0]
    assert [len(list(streams)) for streams in BatchedCapture(tiny.source, VOCAB).by_step(steps[:1])] == [0]


def shuffled_steps(source, world=1, per_step=2):
    """Five steps of a text of which some tokens count, or all, for every rank."""
    start = source.state()
    for rank in range(world):
        source.restore(start)
        yield [source.take_step(per_step * LENGTH, rank, world) for _ in range(5)]


def by_row(rows):
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffled_steps_have_the_tokens_of_all_steps(tiny, world, some):
    """Each as many as before, each token once, in an order that the seed decides and the number of processes does not."""
    rng = np.random.default_rng(8)
    text = Corpus.from_ids(rng.integers(0, VOCAB, 150), answers=rng.random(150) < 0.6 if some else None)

    def steps_of(seed, world):
        """The rows of every step: layers beside each other, the processes one after the other."""
        found = [[] for _ in range(5)]
        for steps in shuffled_steps(Sampler(text, LENGTH, seed=1, repeat=True), world):
            capture = BatchedCapture(tiny.source, VOCAB, with_embedding=True, shuffled=True, seed=seed)
            for i, streams in enumerate(capture.by_step(steps)):
                for stream in streams:
                    assert stream.mask is None
                    streams_of_layers = [*(flat(stream, layer) for layer in (0, 1, 2)), flat(stream, EMBEDDING), np.array(stream.ids).reshape(-1, 1)]
                    found[i].append(np.concatenate(streams_of_layers, axis=1))
        return [np.concatenate(parts) for parts in found]

    (steps,) = shuffled_steps(Sampler(text, LENGTH, seed=1, repeat=True))
    alone = []
    for step in steps:
        for i, sequence in enumerate(step.sequences):
            chosen = slice(None) if step.counted is None else step.counted[i]
            captured = tiny.source.capture(mx.array(sequence[None]), with_embedding=True)
            rows = [*(captured.hidden[layer][0] for layer in (0, 1, 2)), captured.embedding[0], mx.array(sequence)[:, None]]
            alone.append(np.concatenate([np.array(part) for part in rows], axis=1)[chosen])
    found = steps_of(4, world)
    assert [len(rows) for rows in found] == [step.tokens for step in steps]
    np.testing.assert_allclose(by_row(np.concatenate(found)), by_row(np.concatenate(alone)), atol=1e-5)
    for rows, of_one in zip(found, steps_of(4, 1), strict=True):
        np.testing.assert_allclose(by_row(rows), by_row(of_one), atol=1e-5)
    assert any(by_row(rows).tolist() != by_row(other).tolist() for rows, other in zip(found, steps_of(5, world), strict=True))
    if not some:  # a step has tokens of most sequences, and in no sequence's order
        ids = found[0][:, -1].tolist()
        assert all(ids[i : i + LENGTH] not in [s.tolist() for step in steps for s in step.sequences] for i in range(len(ids)))


@given(sequences=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6), seed=st.integers(0, 3))
def test_tokens_are_dealt_by_their_places(sequences, seed):
    """Whatever the lengths, each step has as many tokens of a place as its share of all tokens, to one token more or less for each of the others."""
    steps = []
    for sizes in sequences:
        positions = np.concatenate([np.arange(size) for size in sizes])
        steps.append(Step([], positions.size, {"epoch": 0, "index": len(steps)}, positions=positions))
    owners, places = dealt(steps, seed), np.concatenate([step.positions for step in steps])
    assert np.bincount(owners, minlength=len(steps)).tolist() == [step.tokens for step in steps]
    for i, step in enumerate(steps):
        for place in range(9):
            fair = step.tokens * np.count_nonzero(places == place) / places.size
            assert abs(np.count_nonzero(places[owners == i] == place) - fair) <= len(steps) + 1
    assert np.array_equal(owners, dealt(steps, seed))


def test_the_seed_and_the_place_in_the_text_decide_about_the_deal():
    """Steps of equal sequences: each has one token of every place for each of its sequences."""
    steps = [Step([], 24, {"epoch": 0, "index": 2 * i}, positions=np.tile(np.arange(12), 2)) for i in range(1, 5)]
    owners, later = dealt(steps, 0), dealt([replace(step, state={"epoch": 1, "index": 2}) for step in steps], 0)
    for i in range(4):
        assert np.bincount(np.tile(np.arange(12), 8)[owners == i]).tolist() == [2] * 12
    assert owners.tolist() != dealt(steps, 1).tolist()
    assert owners.tolist() != later.tolist()
    assert len({tuple(owners.reshape(8, 12)[:, place]) for place in range(12)}) > 6  # not the same sequences at every place


def test_a_step_of_its_own_is_not_shuffled(tiny):
    """Its passes are computed when they are asked for, as without the setting."""
    step = Step([np.arange(5, dtype=np.int32)], 5, {})
    (streams,) = BatchedCapture(tiny.source, VOCAB, shuffled=True).by_step([step])
    (stream,) = streams
    assert stream.ids.tolist() == [[0, 1, 2, 3, 4]]


def test_what_joined_tokens_keep(tiny):
    """Tokens that count, and nothing of the passes that they come from."""
    passes = [tiny.source.capture(mx.array([[1, 2, 3], [4, 5, 6]])), tiny.source.capture(mx.array([[7, 8]]))]
    passes[0] = replace(passes[0], mask=mx.array([[True, False, True], [False, True, True]]))
    last = np.concatenate([np.array(passes[0].hidden[-1]).reshape(6, -1)[[0, 2, 4, 5]], np.array(passes[1].hidden[-1])[0]])
    together = joined(passes)
    assert together.ids.tolist() == [[1, 3, 5, 6, 7, 8]]
    assert together.logits.shape == (1, 6, 0)
    np.testing.assert_array_equal(flat(together, -1), last)
    chosen = together.of_tokens(mx.array([4, 0]))
    assert chosen.ids.tolist() == [[7, 1]]
    np.testing.assert_array_equal(flat(chosen, -1), last[[4, 0]])
    assert all(each.hidden == [] for each in passes)


@pytest.mark.parametrize(("tokens", "shuffled", "together"), [(16, 4096, 256), (128, 4096, 32), (128, 300, 4), (2048, 4096, 2), (3000, 4096, 1)])
def test_as_many_steps_as_are_shuffled(tokens, shuffled, together):
    assert steps_together(replace(config(9, tokens), shuffle_tokens=shuffled)) == together


def test_a_shift_needs_whole_sequences():
    with pytest.raises(ValueError, match="loss 'ce' compares tokens of one sequence, which shuffle_tokens would part: set shuffle_tokens to 0"):
        TrainingConfig(loss="ce", shuffle_tokens=64)
    with pytest.raises(ValueError, match="A token_shift compares tokens of one sequence"):
        TrainingConfig(token_shift=2, shuffle_tokens=64)


def test_padding_and_logits_are_divided_too():
    hidden, logits, mask = mx.arange(24).reshape(3, 2, 4), mx.arange(30).reshape(3, 2, 5), mx.array([[True, True], [True, False], [True, True]])
    part = HiddenStates([hidden, -hidden], logits, mask).of_sequences(slice(1, 3))
    assert part.logits.tolist() == logits[1:].tolist()
    assert part.rows(1).tolist() == [(-hidden[1, 0]).tolist(), *(-hidden[2]).tolist()]


@given(num_steps=st.integers(0, 9), together=st.integers(1, 4), per_step=st.integers(1, 3), world=st.integers(1, 2))
def test_from_every_step_on_the_rest_is_the_same(num_steps, together, per_step, world):
    settings = config(num_steps, per_step * LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "PASS_TOKENS", together * per_step * LENGTH)
        assert steps_together(settings) == together
        groups = list(step_groups(sampler(), settings, 0, world - 1, world))
        alone = sampler()
        assert lists(step for group in groups for step in group.steps) == lists(
            alone.take_step(per_step * LENGTH, world - 1, world) for _ in range(num_steps)
        )
        assert [group.first for group in groups] == list(range(0, num_steps, together))
        for number, group in enumerate(groups):
            for i in range(len(group.steps)):
                other, done = sampler(), group.first + i + 1
                other.restore(json.loads(json.dumps(group.resumable(i))))
                rest = list(step_groups(other, settings, done, world - 1, world))
                assert [(r.first, lists(r.steps)) for r in rest] == [
                    (g.first, lists(g.steps)) for g in groups[number + (i == len(group.steps) - 1) :]
                ]


def parameters(lens):
    return {name: np.array(value) for name, value in tree_flatten(lens.parameters())}


def test_a_step_learns_the_same_alone(tiny, monkeypatch):
    ids = mx.array(np.random.default_rng(3).integers(0, VOCAB, 5 * LENGTH + 7))
    lenses = []
    for tokens in (512, LENGTH):
        monkeypatch.setattr(batching, "PASS_TOKENS", tokens)
        lenses.append(parameters(train_loop(tiny.source, tiny.unembed, ids, config(7))))
    for name, value in lenses[0].items():
        np.testing.assert_allclose(value, lenses[1][name], atol=1e-5)


def test_a_run_whose_steps_were_captured_otherwise_is_not_gone_on_with(tiny, monkeypatch, tmp_path):
    """Its position in the text means something else."""
    ids = mx.array(np.random.default_rng(3).integers(0, VOCAB, 5 * LENGTH))
    options = {"checkpoints": CheckpointFolder(tmp_path), "resume": True}
    with pytest.raises(TrainingInterruptedError):
        train_loop(tiny.source, tiny.unembed, ids, config(7), **options, stop=lambda: True)
    monkeypatch.setattr(batching, "PASS_TOKENS", 2 * LENGTH)
    with pytest.raises(ValueError, match="other forward passes: steps captured together was 32 and is 2"):
        train_loop(tiny.source, tiny.unembed, ids, config(7), **options)


def test_ids_that_the_model_does_not_know(tiny):
    with pytest.raises(ValueError, match="has token ids from 3 to 131; the model knows 0 to 130"):
        list(BatchedCapture(tiny.source, VOCAB).hidden_states(Step([np.array([3, 131])], 2, {})))
