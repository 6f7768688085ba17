"""A run that was stopped or killed and resumed gives the lens and the metrics of one that was not, to the last bit."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens.training import (
    Callback,
    CheckpointFolder,
    MetricsFile,
    TrainingConfig,
    TrainingInterruptedError,
    batching,
    clock,
    pass_start,
    recipe,
    train_loop,
)
from metalens.training import step as training_step

LENGTH = 16
SETTINGS = {"num_steps": 6, "max_seq_len": LENGTH, "tokens_per_step": 2 * LENGTH}
BY_LOSS = {"step_size": "loss", "learning_rate": 0.1, "layer_rates": "equal"}
BEFORE = {"step_size": "rate", "learning_rate": 0.025, "weight_decay": 0.15, "layer_rates": "distance"}  # the former settings of `fast`

# Whatever changes what a checkpoint must hold.
RUNS = {
    "paper": recipe("paper", **SETTINGS),
    "mlxterp": recipe("mlxterp", num_steps=6, max_seq_len=LENGTH),
    "adam": recipe("adam", **SETTINGS),
    "muon": recipe("muon", **SETTINGS),
    "without momentum": TrainingConfig(**SETTINGS, momentum=0.0),
    "warm-up": TrainingConfig(**SETTINGS, warmup_steps=3, schedule="constant"),
    "shuffled": TrainingConfig(**SETTINGS, seed=3),
    "tokens shuffled among steps": TrainingConfig(**SETTINGS, seed=3, shuffle_tokens=8 * LENGTH, embedding=True),
    "warm start": TrainingConfig(**SETTINGS, seed=1, warm_start_tokens=3 * LENGTH),
    "one layer after the other": recipe("adam", **SETTINGS, seed=2, layers_at_once=1),
    "two layers, then one, warm": TrainingConfig(**SETTINGS, layers_at_once=2, warm_start_tokens=5 * LENGTH, reduction="sum"),
    "some layers": TrainingConfig(**SETTINGS, layers=(2, 0)),
    "low rank": recipe("muon", **SETTINGS, rank=3, seed=5),
    "biases": recipe("adam", **SETTINGS, bias_only=True),
    "rates by distance": recipe("fast", **SETTINGS, **BEFORE, warm_start_tokens=5 * LENGTH, layers_at_once=2),
    "steps by the loss": recipe("fast", **SETTINGS, warm_start_tokens=5 * LENGTH, layers_at_once=2),
    "sampled vocabulary": recipe("fast", **SETTINGS, warm_start_tokens=5 * LENGTH, layers_at_once=2, vocabulary=40),
    "steps by the loss, cold": recipe("muon", **SETTINGS, **BY_LOSS),
    "steps by the loss, low rank, bfloat16": recipe("muon", **SETTINGS, **BY_LOSS, rank=3, seed=5, dtype="bfloat16"),
    "bfloat16": TrainingConfig(**SETTINGS, dtype="bfloat16", learning_rate=0.3, weight_decay=1e-2),
    "bfloat16, adam, low rank": recipe("adam", **SETTINGS, dtype="bfloat16", rank=2, seed=4),
    "bfloat16, muon, warm": recipe("muon", **SETTINGS, dtype="bfloat16", warm_start_tokens=40, layers_at_once=2),
}


@pytest.fixture(scope="module")
def ids():
    """Five sequences and a shorter one: six steps go through the text more than once, and epochs end within steps."""
    return mx.array(np.random.default_rng(3).integers(0, 131, 5 * LENGTH + 7))


def bits(lens):
    return {name: np.array(value).tobytes() for name, value in tree_flatten(lens.parameters())}


def metrics(path):
    """Every line but how long it took."""
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"} for line in path.read_text().splitlines()]


def resumed(model, ids, config, folder, limit):
    """Train with an interruption after every `limit` steps; the number of interruptions and the lens."""
    interruptions = 0
    while True:
        left = iter(range(limit - 1))
        try:
            lens = train_loop(
                model.source,
                model.unembed,
                ids,
                config,
                callbacks=[MetricsFile(folder / "metrics.jsonl")],
                checkpoints=CheckpointFolder(folder / "checkpoints"),
                resume=True,
                stop=lambda left=left: next(left, None) is None,
            )
        except TrainingInterruptedError:
            interruptions += 1
        else:
            return interruptions, lens


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_pieces_is_the_run_in_one(tiny, ids, tmp_path, name):
    config = RUNS[name]
    straight = train_loop(tiny.source, tiny.unembed, ids, config, callbacks=[MetricsFile(tmp_path / "straight.jsonl")])
    steps = len(metrics(tmp_path / "straight.jsonl"))
    for limit in (1, 4):
        interruptions, lens = resumed(tiny, ids, config, tmp_path / str(limit), limit)
        assert interruptions == (steps - 1) // limit
        assert bits(lens) == bits(straight)
        assert metrics(tmp_path / str(limit) / "metrics.jsonl") == metrics(tmp_path / "straight.jsonl")


def test_where_checkpoints_are_written_does_not_matter(tiny, ids, tmp_path):
    straight = train_loop(tiny.source, tiny.unembed, ids, RUNS["shuffled"])
    for every in (1, 4, 100):
        lens = train_loop(
            tiny.source, tiny.unembed, ids, RUNS["shuffled"], checkpoints=CheckpointFolder(tmp_path / str(every)), checkpoint_every=every
        )
        assert bits(lens) == bits(straight)


def test_resuming_a_finished_run_gives_its_lens(tiny, ids, tmp_path):
    seen = []
    options = {"checkpoints": CheckpointFolder(tmp_path), "callbacks": [seen.append], "resume": True}
    first, second = (train_loop(tiny.source, tiny.unembed, ids, RUNS["one layer after the other"], **options) for _ in range(2))
    assert bits(first) == bits(second)
    assert len(seen) == 24  # all of the first: the embedding and three blocks


def test_what_a_kill_after_the_last_checkpoint_left_is_removed(tiny, ids, tmp_path):
    """A run that was killed between writing its last checkpoint and deleting an old one takes no step any more when it goes on."""
    folder = CheckpointFolder(tmp_path)
    config = RUNS["warm start"]
    train_loop(tiny.source, tiny.unembed, ids, config, checkpoints=folder, checkpoint_every=1)
    kept = folder.steps()
    shutil.copytree(tmp_path / f"step-{kept[-1]:08d}", tmp_path / "step-00000001")
    train_loop(tiny.source, tiny.unembed, ids, config, checkpoints=folder, checkpoint_every=1, resume=True)
    assert len(kept) == 2
    assert folder.steps() == kept


def test_what_was_skipped_and_seen_is_carried_on(tiny, ids, tmp_path):
    folder, seen = tmp_path, []
    config = RUNS["warm start"]
    whole = []
    train_loop(tiny.source, tiny.unembed, ids, config, callbacks=[whole.append])
    with pytest.raises(TrainingInterruptedError, match="after step 2"):
        train_loop(
            tiny.source,
            tiny.unembed,
            ids,
            config,
            callbacks=[seen.append],
            checkpoints=CheckpointFolder(folder),
            stop=lambda: seen[-1:] and seen[-1].step == 1,
        )
    file = max(folder.glob("step-*")) / "state.json"
    assert json.loads(file.read_text())["tokens"] == whole[1].tokens
    train_loop(tiny.source, tiny.unembed, ids, config, callbacks=[seen.append], checkpoints=CheckpointFolder(folder), resume=True)
    assert [p.tokens for p in seen] == [p.tokens for p in whole]
    assert [p.step for p in seen] == list(range(6))


def test_without_a_checkpoint_it_begins_at_the_beginning(tiny, ids, tmp_path):
    straight = train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"])
    assert bits(train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], checkpoints=CheckpointFolder(tmp_path), resume=True)) == bits(straight)


def test_a_new_run_does_not_mix_with_an_old_one_s_checkpoints(tiny, ids, tmp_path):
    folder = CheckpointFolder(tmp_path)
    train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], checkpoints=folder)
    with pytest.raises(ValueError, match=r"has checkpoints already, the newest after step 6\. Go on from it with resume, or give another folder"):
        train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], checkpoints=folder)
    assert folder.steps() == [6]


def test_stopping_without_a_folder(tiny, ids):
    with pytest.raises(TrainingInterruptedError, match="Stopped after step 1"):
        train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], stop=lambda: True)


def test_a_wish_to_stop_after_the_last_step_is_too_late(tiny, ids):
    seen = []
    train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], callbacks=[seen.append], stop=lambda: len(seen) == 6)


# Stopped within a step or a warm start


class Stop:
    """Asks to stop from the n-th time on that it is called; counts how often it was called after that."""

    def __init__(self, n):
        self.left, self.later = n, 0

    def __call__(self):
        self.left -= 1
        self.later += self.left < 0
        return self.left <= 0


@pytest.fixture
def slow(monkeypatch):
    """Let every step seem long, in passes of one sequence and pieces of six tokens."""
    monkeypatch.setattr(clock, "QUICK", -1.0)
    monkeypatch.setattr(batching, "PASS_TOKENS", LENGTH)
    monkeypatch.setattr(training_step, "PIECE_WORK", 0)
    monkeypatch.setattr(training_step, "LEAST_PIECE", 6)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", ["shuffled", "tokens shuffled among steps", "rates by distance", "sampled vocabulary", "bfloat16, muon, warm"])
def test_stopped_at_any_moment_and_resumed(tiny, ids, tmp_path, name):
    """Every run goes on a little further than the one before: at some moment each pause of the whole run has been the last one."""
    config, interruptions = RUNS[name], []
    straight = train_loop(tiny.source, tiny.unembed, ids, config)
    for n in range(1, 400, 7):
        try:
            stop = Stop(n)
            lens = train_loop(tiny.source, tiny.unembed, ids, config, checkpoints=CheckpointFolder(tmp_path), resume=True, stop=stop)
        except TrainingInterruptedError as error:
            interruptions.append((stop.later, error.learned, bool(CheckpointFolder(tmp_path).steps())))
        else:
            break
    assert all(later == 0 for later, _, _ in interruptions)  # answered at the first pause
    assert all(learned == kept for _, learned, kept in interruptions)
    assert len(interruptions) > 3
    assert bits(lens) == bits(straight)


@pytest.mark.usefixtures("slow")
def test_a_stop_within_the_first_step_leaves_nothing(tiny, ids, tmp_path):
    with pytest.raises(TrainingInterruptedError, match="within the first step, which begins anew") as error:
        train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], checkpoints=CheckpointFolder(tmp_path), stop=Stop(5))
    assert not error.value.learned
    assert CheckpointFolder(tmp_path).steps() == []


@pytest.mark.usefixtures("slow")
def test_a_stop_within_the_warm_start_is_answered_there(tiny, ids, tmp_path, monkeypatch):
    passes = []
    capture = type(tiny.source).capture
    monkeypatch.setattr(type(tiny.source), "capture", lambda *args, **options: passes.append(1) or capture(*args, **options))
    with pytest.raises(TrainingInterruptedError, match="Stopped within the warm start, which begins anew") as error:
        train_loop(tiny.source, tiny.unembed, ids, RUNS["warm start"], checkpoints=CheckpointFolder(tmp_path), stop=lambda: len(passes) == 2)
    assert (len(passes), error.value.learned) == (2, False)


def test_a_short_step_is_finished(tiny, ids, tmp_path):
    with pytest.raises(TrainingInterruptedError, match="Stopped after step 1"):
        train_loop(tiny.source, tiny.unembed, ids, RUNS["paper"], checkpoints=CheckpointFolder(tmp_path), stop=lambda: True)
    assert CheckpointFolder(tmp_path).steps() == [1]


@pytest.mark.parametrize("num_steps", [0, 6])
def test_a_solved_warm_start_is_not_repeated(tiny, ids, tmp_path, monkeypatch, num_steps):
    config = replace(RUNS["rates by distance"], num_steps=num_steps, layers_at_once=None)
    straight, seen = train_loop(tiny.source, tiny.unembed, ids, config), []
    folder = CheckpointFolder(tmp_path)

    class Killed(Callback):
        def on_checkpoint(self, step, path):
            seen.append(step)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_loop(tiny.source, tiny.unembed, ids, config, checkpoints=folder, callbacks=[Killed()])
    assert seen == folder.steps() == [0]
    monkeypatch.setattr(pass_start, "regressions", None)
    assert bits(train_loop(tiny.source, tiny.unembed, ids, config, checkpoints=folder, resume=True)) == bits(straight)


# Killed

# A run in two passes with everything that has a state; a checkpoint after every step. What takes seconds to import and is not needed is left out.
SCRIPT = """
import importlib.util, os, sys, time, types

class Absent(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

package = types.ModuleType("mlx_lm")
package.__path__ = list(importlib.util.find_spec("mlx_lm").submodule_search_locations)
sys.modules |= {"mlx_lm": package} | {name: Absent(name) for name in ("transformers", "mlx_lm.utils", "mlx_lm.tokenizer_utils")}

import mlx.core as mx
import numpy as np
from pathlib import Path
from metalens.models.capture import ResidualCapture
from metalens.training import CheckpointFolder, MetricsFile, TrainingConfig, train_loop
from metalens.models.unembed import Unembed
from support.mocks import MockModel

mx.set_default_device(mx.cpu)
fsync, slow, folder = os.fsync, float(os.environ["SLOW"]), Path(os.environ["FOLDER"])
os.fsync = lambda handle: (time.sleep(slow), fsync(handle))
model = MockModel()
config = TrainingConfig(
    num_steps=60, max_seq_len=16, tokens_per_step=32, seed=3, optimizer="adam", learning_rate=1e-3, weight_decay=1e-2, dtype="bfloat16",
    layers_at_once=2, warm_start_tokens=64,
)
ids = mx.array(np.random.default_rng(1).integers(0, 100, 16 * 17 + 5))
options = {"checkpoints": CheckpointFolder(folder / "checkpoints"), "checkpoint_every": 1, "resume": True}
metrics = MetricsFile(folder / "metrics.jsonl")
print("ready", flush=True)
train_loop(ResidualCapture(model), Unembed.from_model(model), ids, config, callbacks=[metrics], **options).save(folder / "lens")
"""


def started(folder, slow):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "FOLDER": str(folder),
        "SLOW": str(slow),
    }
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Warning" not in errors


def result(folder):
    return (folder / "lens.npz").read_bytes(), (folder / "lens.json").read_bytes(), metrics(folder / "metrics.jsonl")


def test_killed_at_twenty_moments(tmp_path):
    dice = random.Random(0)
    straight = tmp_path / "straight"
    finish(started(straight, 0.0))
    expected = result(straight)
    assert len(expected[2]) == 120

    kills = killed_while_saving = runs = 0
    while kills < 20:
        folder = tmp_path / f"run-{runs}"
        runs += 1
        finished = False
        while not finished:
            process = started(folder, 0.03 if kills % 2 else 0.0)
            if kills < 20:
                time.sleep(dice.uniform(0.0, 0.4))
                process.kill()
                _, errors = process.communicate()
                assert process.returncode in (0, -9), errors
                assert "Warning" not in errors
                kills += process.returncode == -9
                killed_while_saving += any((folder / "checkpoints").glob(".step-*"))
                finished = process.returncode == 0
            else:
                finish(process)
                finished = True
        assert result(folder) == expected
        assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step-00000119", "step-00000120"]
    assert killed_while_saving >= 3
