"""Several short steps in one forward pass: the same streams, the same order, the same place in the text."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.training import CheckpointFolder, Corpus, TrainingConfig, TrainingInterruptedError, batching, train_loop
from metalens.training.batching import BatchedCapture, step_groups, steps_together
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
