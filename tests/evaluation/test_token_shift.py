"""A lens that was trained with a token_shift is scored against what it was trained for, against float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens, evaluate, train
from metalens.display.tables import evaluation_table
from metalens.lenses.lens import lens_kind, token_shift_of
from metalens.training.data import Corpus
from support import oracle

LENGTH = 8


@pytest.fixture
def lens(rng):
    return oracle.random_lens(rng)


@pytest.fixture
def sequences(rng):
    return [rng.integers(0, 131, size).tolist() for size in (8, 8, 5, 2)]


def expected(model, lens, sequences, shift, counted=None):
    """(kl, ce, top1, positions) of the last layer but one, in float64: position by position, as the definition says it."""
    unembedding, kl, nll, top1 = oracle.Unembedding(model.unembed), [], [], []
    weight, bias = (oracle.wide(part) for part in lens.dense(1))
    for n, ids in enumerate(sequences):
        hidden = [oracle.wide(h)[0] for h in model.source.capture(mx.array([ids])).hidden]
        z, z_model = unembedding.translated(hidden[1], weight, bias), unembedding.logits(hidden[-1])
        for t in range(len(ids)):
            partner = t + shift - 1
            if not 0 <= partner < len(ids) or not (counted is None or counted[n][t]):
                continue
            kl.append(oracle.kl(z_model[partner], z[t]))
            top1.append(z_model[partner].argmax() == z[t].argmax())
            if partner + 1 < len(ids):
                nll.append(-oracle.log_softmax(z[t])[ids[partner + 1]])
    return np.mean(kl), np.mean(nll), np.mean(top1), len(kl)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("shift", [-2, 0, 1, 2, 4])
def test_against_float64(tiny, lens, sequences, shift):
    result = evaluate(tiny, sequences, lens, max_seq_len=LENGTH, token_shift=shift, layer_transfer=True, logit_stats=True, embedding=True)
    kl, ce, top1, positions = expected(tiny, lens, sequences, shift)
    assert (result.tokens, result.token_shift) == (positions, shift)
    assert vars(result.tuned[1]).items() >= {"top1": pytest.approx(top1)}.items()
    assert result.tuned[1].kl == pytest.approx(kl, rel=1e-5)
    assert result.tuned[1].ce == pytest.approx(ce, rel=1e-5)
    assert result.transfer.ce[1][1] == pytest.approx(ce, rel=1e-5)
    assert result.transfer.kl_model[1][1] == pytest.approx(kl, rel=1e-5)
    assert (result.model.kl, result.model.top1) == (0.0, 1.0)  # it is the reference
    assert result.logit_stats["tuned"].n == positions
    assert result.sequences.positions.sum() == positions
    assert result.bytes_per_token == 1.0  # a fact of the text, whatever is scored
    assert result.tuned[1].bits_per_byte == pytest.approx(ce / math.log(2), rel=1e-5)


def test_the_tokens_that_count(tiny, lens, rng):
    ids, answers = rng.integers(0, 131, 24), rng.random(24) < 0.5
    result = evaluate(tiny, Corpus.from_ids(ids, answers=answers), lens, max_seq_len=LENGTH, token_shift=2)
    cuts = [slice(start, start + LENGTH) for start in range(0, 24, LENGTH)]
    counted = Corpus.from_ids(ids, answers=answers).counted
    kl, ce, _, positions = expected(tiny, lens, [ids[cut].tolist() for cut in cuts], 2, [counted[cut] for cut in cuts])
    assert result.tokens == positions
    assert (result.tuned[1].kl, result.tuned[1].ce) == (pytest.approx(kl, rel=1e-5), pytest.approx(ce, rel=1e-5))


def test_one_is_the_next_token(tiny, lens, sequences):
    assert evaluate(tiny, sequences, lens, token_shift=1) == evaluate(tiny, sequences, lens)


@pytest.mark.parametrize(
    ("training", "shift"),
    [
        ({}, 1),
        ({"loss": "kl", "token_shift": None}, 1),
        ({"loss": "kl", "token_shift": 0}, 1),
        ({"loss": "kl", "token_shift": 2}, 3),
        ({"loss": "ce", "token_shift": None}, 1),
        ({"loss": "ce", "token_shift": 2}, 2),
        ({"token_shift": "2"}, 1),
    ],
)
def test_the_lens_remembers_it(tiny, sequences, training, shift, tmp_path):
    lens = TunedLens(3, 64)
    lens.provenance = {"training": training}
    lens.save(tmp_path / "lens")
    assert token_shift_of(TunedLens.load(tmp_path / "lens")) == shift
    assert evaluate(tiny, sequences, tmp_path / "lens").token_shift == shift
    assert evaluate(tiny, sequences, tmp_path / "lens", token_shift=1).token_shift == 1
    assert token_shift_of(None) == token_shift_of(lambda h, layer: h) == 1
    name = "tuned lens" if shift == 1 else f"tuned lens, token shift {shift}"  # readings compare at the same position, so their name tells
    read = tiny.trajectory(sequences[0], tmp_path / "lens")
    assert (lens_kind(lens), read.lens, tiny.read(sequences[0], lens).lens) == (name, name, name)
    assert read.compare(tiny.trajectory(sequences[0])).names == (name, "logit lens")


def test_a_trained_lens_is_better_at_what_it_was_trained_for(make_llama, rng):
    """The text repeats a cycle, so the model's prediction two positions on can be known."""
    model, ids = InterpretableModel(make_llama()), np.tile(rng.permutation(131)[:6], 60)
    lens = train(
        model, ids, recipe="adam", num_steps=30, learning_rate=0.02, max_seq_len=12, tokens_per_step=48, repeat=True, embedding=False, token_shift=1
    )
    assert token_shift_of(lens) == 2
    right, wrong = (evaluate(model, ids[:120], lens, max_seq_len=12, token_shift=shift) for shift in (None, 1))
    assert right.token_shift == 2
    assert all(a.kl < b.kl / 2 for a, b in zip(right.tuned, wrong.tuned, strict=True))


def test_it_is_said(tiny, lens, sequences):
    result = evaluate(tiny, sequences, lens, token_shift=2)
    assert result.to_dict()["token_shift"] == 2
    assert "the token 2 positions from each prediction" in evaluation_table(result).caption
    assert "token_shift" in repr(result)
    assert "token_shift" not in repr(evaluate(tiny, sequences, lens))


def test_a_shift_beyond_every_sequence(tiny, sequences):
    with pytest.raises(ValueError, match="No sequence has a token 9 positions from another"):
        evaluate(tiny, sequences, token_shift=9)
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(tiny, [], token_shift=9)
