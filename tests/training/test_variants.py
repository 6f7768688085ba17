"""Lenses of low rank, of biases, of some layers; and steps that are spoiled."""

import json
import math
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.training import CheckpointFolder, MetricsFile, TrainingConfig, TrainingInterruptedError, loss_and_gradient, recipe, train_loop

LENGTH = 16
RATES = {"sgd": 0.5, "adam": 1e-2, "muon": 0.03}


@pytest.fixture
def ids(rng):
    """A text that repeats itself, so that there is something to learn."""
    return mx.array(np.tile(rng.integers(0, 131, 8), 8))


def run(model, ids, callback=None, **settings):
    optimizer = settings.get("optimizer", "sgd")
    config = TrainingConfig(**{"num_steps": 25, "max_seq_len": LENGTH, "learning_rate": RATES[optimizer], "reduction": "sum"} | settings)
    return train_loop(model.source, model.unembed, ids, config, callbacks=[] if callback is None else [callback])


def losses(lens, model, ids):
    return loss_and_gradient(lens, model.source.capture(ids[None]), model.unembed)[0].tolist()


VARIANTS = {"full": {}, "low rank": {"rank": 4}, "biases": {"bias_only": True}, "bfloat16": {"dtype": "bfloat16", "rank": 4}}


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(tiny, ids, name, optimizer):
    variant = VARIANTS[name]
    seen = []
    rate = (
        0.3 if (name, optimizer) == ("biases", "muon") else RATES[optimizer]
    )  # its vectors' steps have unit length, its matrices' unit spectral norm
    lens = run(tiny, ids, seen.append, optimizer=optimizer, learning_rate=rate, **variant)
    assert lens.variant == ("bias" if "bias_only" in variant else "low-rank" if "rank" in variant else "full")
    assert set(parameters_of(lens.translators[0])) == set(parameters_of(TunedLens(3, 64, rank=lens.rank, bias_only=lens.bias_only).translators[0]))
    most = 0.9 if name == "biases" else 0.6
    assert all(after < most * before for before, after in zip(seen[0].losses[:2], seen[-1].losses[:2], strict=True))
    assert seen[-1].losses[2] < 1e-6


@pytest.mark.parametrize("variant", [{}, {"rank": 4}, {"bias_only": True}], ids=["full", "low-rank", "bias"])
def test_only_the_chosen_layers_are_trained(tiny, ids, variant):
    seen = []
    lens = run(tiny, ids, seen.append, layers=(1,), **variant)
    assert lens.layers == [1]
    assert (seen[0].layers, len(seen[0].losses)) == ([1], 1)
    assert seen[-1].losses[0] < 0.9 * seen[0].losses[0]
    for layer in (0, 2):
        assert parameters_of(lens.translators[layer]) == {}
        assert mx.array_equal(lens.translators[layer].weight, mx.eye(64))
    h = mx.random.normal((3, 64))
    assert mx.array_equal(lens(h, 0), h)
    assert not mx.array_equal(lens(h, 1), h)


def test_layers_that_the_clip_does_not_couple_are_trained_alone_as_together(tiny, ids):
    """The sum over layers gives every layer its own gradient: the same lens whichever others are trained, and however many at once."""
    together = run(tiny, ids, gradient_clip=1e9)
    for layer in range(3):
        alone = run(tiny, ids, gradient_clip=1e9, layers=(layer,))
        for name, p in parameters_of(alone.translators[layer]).items():
            np.testing.assert_allclose(np.array(p), np.array(together.translators[layer][name]), atol=1e-5)
    in_turn = run(tiny, ids, gradient_clip=1e9, layers_at_once=2)
    for (name, a), (_, b) in zip(tree_flatten(in_turn.parameters()), tree_flatten(together.parameters()), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("variant", [{"rank": 65}, {"layers": (0, 3)}, {"layers": (-1,)}])
def test_what_does_not_fit_the_model_is_an_error(tiny, ids, variant):
    with pytest.raises(ValueError, match="rank must be from 1 to 64|layers must be from 0 to 2"):
        run(tiny, ids, **variant)


def test_the_loss_of_a_lens_is_what_it_was_trained_to(tiny, ids):
    """The run's last loss is from before its last update: one more step says where it got to."""
    seen = []
    lens = run(tiny, ids, seen.append, num_steps=30, schedule="constant", learning_rate=0.1)
    more = []
    run(tiny, ids, more.append, num_steps=31, schedule="constant", learning_rate=0.1)
    assert losses(lens, tiny, ids[:LENGTH]) == pytest.approx(more[-1].losses, abs=1e-5)


# Spoiled steps


@pytest.fixture
def poisoned(monkeypatch):
    """A function that makes the model's streams NaN in one layer (the last for -1), or infinite, in some of the forward passes to come.

    Every step has passes of its own.
    """
    monkeypatch.setattr("metalens.training.batching.PASS_TOKENS", LENGTH)
    original = ResidualCapture.capture

    def poison(*passes, layer=0, value=math.nan):
        count = iter(range(10**9))

        def capture(self, ids, *others, **options):
            stream = original(self, ids, *others, **options)
            if next(count) not in passes:
                return stream
            hidden = list(stream.hidden)
            hidden[layer] = hidden[layer] * value
            return HiddenStates(hidden, stream.logits)

        monkeypatch.setattr(ResidualCapture, "capture", capture)

    return poison


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}, {"optimizer": "muon", "rank": 4}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize(("layer", "value"), [(0, math.nan), (-1, math.nan), (1, math.inf)])
def test_a_poisoned_batch_is_skipped_counted_and_reported(tiny, ids, poisoned, settings, layer, value):
    before, after = [], []
    clean = run(tiny, ids, before.append, num_steps=3, schedule="constant", **settings)
    poisoned(3, 5, layer=layer, value=value)
    with pytest.warns(RuntimeWarning, match=r"Step \d has a loss or gradient that is not finite; it is skipped") as caught:
        lens = run(tiny, ids, after.append, num_steps=6, schedule="constant", **settings)
    assert [str(w.message).split(" has")[0] for w in caught] == ["Step 3", "Step 5"]
    assert [p.skipped for p in after] == [0, 0, 0, 1, 1, 2]
    assert [p.tokens for p in after] == [LENGTH * (step + 1) for step in range(6)]
    assert [math.isfinite(p.loss) for p in after] == [True, True, True, False, True, False]
    assert [p.losses for p in after[:3]] == [p.losses for p in before]
    # All four sequences are alike: step 4 finds the lens as step 3 did, which is as three steps left it.
    assert losses(clean, tiny, ids[:LENGTH]) == pytest.approx(after[4].losses, abs=1e-6)
    assert all(np.isfinite(np.array(p)).all() for _, p in tree_flatten(lens.parameters()))


def test_one_bad_pass_of_many_spoils_its_step_alone(tiny, ids, poisoned, monkeypatch):
    """A step of four sequences in two passes, of which one is bad."""
    monkeypatch.setattr("metalens.training.batching.PASS_TOKENS", 2 * LENGTH)
    seen = []
    poisoned(3)
    with pytest.warns(RuntimeWarning, match="Step 1 "):
        run(tiny, ids, seen.append, num_steps=3, tokens_per_step=4 * LENGTH)
    assert [p.skipped for p in seen] == [0, 1, 1]


def test_what_was_skipped_is_in_the_metrics_and_the_checkpoint(tiny, ids, poisoned, tmp_path):
    folder, file, seen = CheckpointFolder(tmp_path / "checkpoints"), MetricsFile(tmp_path / "metrics.jsonl"), []
    config = TrainingConfig(num_steps=4, max_seq_len=LENGTH)
    poisoned(1)
    with pytest.warns(RuntimeWarning, match="Step 1 "), pytest.raises(TrainingInterruptedError):
        train_loop(tiny.source, tiny.unembed, ids, config, callbacks=[seen.append, file], checkpoints=folder, stop=lambda: len(seen) == 2)
    train_loop(tiny.source, tiny.unembed, ids, config, callbacks=[seen.append, file], checkpoints=folder, resume=True)
    assert [p.skipped for p in seen] == [0, 1, 1, 1]
    entries = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [(entry["skipped"], entry["loss"] is None, entry["gradient_norm"] is None) for entry in entries] == [
        (0, False, False),
        (1, True, True),
        (1, False, False),
        (1, False, False),
    ]


def test_a_poisoned_warm_start_is_an_error(tiny, ids, poisoned):
    poisoned(0, layer=-1)
    with pytest.raises(ValueError, match="states that are not finite"):
        run(tiny, ids, warm_start_tokens=LENGTH, layers=(0,))


@pytest.mark.parametrize("name", ["paper", "mlxterp", "adam", "muon"])
def test_the_recipes_are_silent_and_learn(tiny, ids, name):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = {} if name == "mlxterp" else {"tokens_per_step": 4 * LENGTH}
        train_loop(tiny.source, tiny.unembed, ids, recipe(name, num_steps=30, max_seq_len=LENGTH, **settings), callbacks=[seen.append])
    assert seen[-1].loss < 0.8 * seen[0].loss
