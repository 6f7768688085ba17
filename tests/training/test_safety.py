"""What a run must never do: lose an older lens, call a failure a success, or write where another run writes."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens
from metalens.training import TrainingDivergedError, train
from metalens.utils.errors import InvalidValueError
from metalens.utils.lock import LockedError
from metalens.utils.outputs import NotOursError

SETTINGS = {"recipe": "mlxterp", "max_seq_len": 16, "num_steps": 3}


@pytest.fixture
def ids(rng):
    return rng.integers(0, 131, 64)


@pytest.fixture
def out(tmp_path):
    """Return the path of an older lens."""
    lens = TunedLens(3, 64)
    lens.provenance = {"model": "older"}
    lens.save(tmp_path / "lens")
    return tmp_path / "lens"


def is_older(out):
    return TunedLens.load(out).provenance == {"model": "older"}


@pytest.mark.filterwarnings("ignore:Step")
def test_a_run_that_diverges_fails_and_leaves_the_older_lens(tiny, ids, out):
    with pytest.raises(TrainingDivergedError, match=r"has diverged: the translators of layers \[.*\] hold NaN.*older lens stays.*Lower the learning"):
        train(tiny, ids, out=out, learning_rate=1e300, **SETTINGS)
    assert is_older(out)
    assert not (out.parent / "lens.checkpoints" / "finished").exists()
    with pytest.raises(TrainingDivergedError):
        tiny.train_tuned_lens([ids], 3, learning_rate=1e300, max_seq_len=16, verbose=False)


@pytest.fixture
def overflowing(make_llama):
    """Return a float16 model whose hidden states are not finite after token 5."""
    model = InterpretableModel(make_llama(bits=None, dtype=mx.float16))
    _ = model.unembed
    model.model.model.embed_tokens.weight[5] = mx.inf
    return model


@pytest.mark.filterwarnings("ignore:Step")
def test_a_run_whose_every_step_was_skipped_fails_and_leaves_the_older_lens(overflowing, ids, out):
    ids[::4] = 5
    with pytest.raises(TrainingDivergedError, match=r"of all 3 steps was not finite.*float16.*convert it to bfloat16"):
        train(overflowing, ids, out=out, **SETTINGS)
    assert is_older(out)


def test_skipped_steps_are_in_the_provenance(overflowing, ids, out):
    ids[ids == 5] = 6
    ids[20] = 5  # in the second sequence
    with pytest.warns(RuntimeWarning, match="is skipped.*bfloat16"):
        lens = train(overflowing, ids, out=out, **SETTINGS)
    assert lens.provenance["training"]["skipped_steps"] == 1
    assert train(overflowing, ids, out=out, resume=True, **SETTINGS).provenance == lens.provenance == TunedLens.load(out).provenance


def test_two_runs_do_not_write_to_one_place(tiny, ids, out, tmp_path):
    def second(**changes):
        with pytest.raises(LockedError, match=rf"Another run \(pid {os.getpid()} .*writes to"):
            train(tiny, ids, **SETTINGS | changes)

    seen = []

    def on_step(progress):
        seen.append(progress)
        second(out=out)
        second(out=out, resume=True)
        second(out=out, checkpoint_dir=tmp_path / "other")
        second(checkpoint_dir=tmp_path / "lens.checkpoints", resume=True)

    train(tiny, ids, out=out, callbacks=[on_step], **SETTINGS)
    assert len(seen) == 3
    train(tiny, ids, out=out, **SETTINGS)  # the lock is gone
    assert not [name for folder in (tmp_path, tmp_path / "lens.checkpoints") for name in os.listdir(folder) if "lock" in name]


@pytest.mark.parametrize("name", ["config.json", "config.npz"])
def test_an_output_does_not_replace_another_s_file(tiny, ids, tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(NotOursError, match=rf"{name} exists and is not"):
        train(tiny, ids, out=tmp_path / "config", **SETTINGS)
    assert os.listdir(tmp_path) == [name]  # found before anything was done
    train(tiny, ids, out=tmp_path / "config", force=True, **SETTINGS)
    TunedLens.load(tmp_path / "config")


def test_an_output_that_is_an_input_is_refused_always(tiny, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"num_layers": 3, "hidden_dim": 64, "text": "words"}))
    os.symlink("x.json", tmp_path / "text.json")
    for data in (tmp_path / "x.json", tmp_path / "text.json", tmp_path):
        with pytest.raises(InvalidValueError, match=r"x\.json is read and would be replaced"):
            train(tiny, data, out=tmp_path / "x", force=True, **SETTINGS)
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    with pytest.raises(InvalidValueError, match="is read and would be replaced"):
        train(tiny, np.arange(40), config=tmp_path / "settings.json", out=tmp_path / "settings", force=True, **SETTINGS)


def test_an_output_of_any_bytes(tiny, ids, tmp_path):
    out = tmp_path / os.fsdecode(b"bad\xff")
    lens = train(tiny, ids, out=out, **SETTINGS)
    assert train(tiny, ids, out=out, resume=True, **SETTINGS).provenance == lens.provenance
    assert TunedLens.load(out).provenance == lens.provenance


def test_training_leaves_mlx_s_random_state_alone(tiny, ids):
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    for options in ({}, {"rank": 2}, {"optimizer": "muon", "dtype": "bfloat16", "seed": 3}):
        train(tiny, ids, **SETTINGS | options)
    assert mx.random.uniform().item() == expected
