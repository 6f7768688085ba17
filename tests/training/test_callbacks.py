"""Who is told what, and when."""

import builtins
import json
import math
import sys
import types

import mlx.core as mx
import pytest

from metalens.training import (
    Callback,
    CheckpointFolder,
    MetricsFile,
    Progress,
    TensorBoard,
    TrainingConfig,
    TrainingInterruptedError,
    WandB,
    train_loop,
)
from metalens.training import callbacks as module
from metalens.utils.files import atomic_write
from metalens.utils.outputs import NotOursError
from support.full_disk import largest_file

LENGTH = 16
CONFIG = TrainingConfig(num_steps=4, max_seq_len=LENGTH)


@pytest.fixture
def ids(rng):
    return mx.array(rng.integers(0, 131, 4 * LENGTH))


def progress(step=0, loss=1.5):
    return Progress(step, loss, [1.0, loss], 32, [0, 2], 0.25, 0.1, 1000.0, 1)


def run(model, ids, *callbacks, config=CONFIG, **options):
    return train_loop(model.source, model.unembed, ids, config, callbacks=callbacks, **options)


# Callbacks


class Noted(Callback):
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def on_start(self, config, first_step):
        self.calls.append((self.name, "start", first_step))

    def on_step(self, progress):
        self.calls.append((self.name, "step", progress.step))

    def on_checkpoint(self, step, path):
        assert (path / "state.json").is_file()
        self.calls.append((self.name, "checkpoint", step, path.name))

    def on_end(self):
        self.calls.append((self.name, "end"))


def test_the_order_of_calls(tiny, ids, tmp_path):
    calls = []
    options = {"checkpoints": CheckpointFolder(tmp_path), "checkpoint_every": 2}
    run(tiny, ids, Noted("a", calls), Noted("b", calls), lambda p: calls.append(("function", "step", p.step)), **options)
    assert [call for call in calls if call[0] != "function"] == [
        ("a", "start", 0),
        ("b", "start", 0),
        *[(name, "step", step) for step in (0, 1) for name in "ab"],
        *[(name, "checkpoint", 2, "step-00000002") for name in "ab"],
        *[(name, "step", step) for step in (2, 3) for name in "ab"],
        *[(name, "checkpoint", 4, "step-00000004") for name in "ab"],
        ("a", "end"),
        ("b", "end"),
    ]
    assert calls[2:5] == [("a", "step", 0), ("b", "step", 0), ("function", "step", 0)]


def test_steps_are_counted_over_all_passes(tiny, ids, tmp_path):
    calls, seen = [], []
    config = TrainingConfig(num_steps=2, max_seq_len=LENGTH, layers_at_once=2)
    run(tiny, ids, Noted("a", calls), seen.append, config=config, checkpoints=CheckpointFolder(tmp_path))
    assert calls[1:-1] == [
        *[("a", "step", 0), ("a", "step", 1), ("a", "checkpoint", 2, "step-00000002")],
        *[("a", "step", 2), ("a", "step", 3), ("a", "checkpoint", 4, "step-00000004")],
    ]
    assert [p.layers for p in seen] == [[0, 1], [0, 1], [2], [2]]
    assert [len(p.losses) for p in seen] == [2, 2, 1, 1]
    assert [p.learning_rate for p in seen] == [1.0, 0.5, 1.0, 0.5]


def test_a_resumed_run_says_where_it_begins(tiny, ids, tmp_path):
    calls, folder = [], CheckpointFolder(tmp_path)
    with pytest.raises(TrainingInterruptedError):
        run(tiny, ids, Noted("a", calls), checkpoints=folder, stop=lambda: len(calls) == 4)
    assert calls[-2:] == [("a", "checkpoint", 3, "step-00000003"), ("a", "end")]
    del calls[:]
    run(tiny, ids, Noted("a", calls), checkpoints=folder, resume=True)
    assert calls[:2] == [("a", "start", 3), ("a", "step", 3)]


@pytest.mark.parametrize("where", ["on_start", "on_step", "on_checkpoint"])
def test_a_run_that_fails_ends(tiny, ids, tmp_path, where):
    calls = []

    class Broken(Callback):
        pass

    def fail(*args):
        raise ZeroDivisionError

    broken = Broken()
    setattr(broken, where, fail)
    with pytest.raises(ZeroDivisionError):
        run(tiny, ids, Noted("a", calls), broken, checkpoints=CheckpointFolder(tmp_path))
    assert calls[-1] == ("a", "end")


def test_a_callback_does_nothing_by_itself(tiny, ids, tmp_path):
    run(tiny, ids, Callback(), checkpoints=CheckpointFolder(tmp_path))


def test_what_a_step_says(tiny, ids):
    seen = []
    run(tiny, ids, seen.append)
    for p in seen:
        assert p.loss == pytest.approx(math.fsum(p.losses) / 3)
        assert p.layers == [0, 1, 2]
        assert p.tokens_per_second > 0
        assert p.gradient_norm > 0
        assert p.skipped == 0
        assert all(type(value) in (int, float, list) for value in vars(p).values())


# The file


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_a_line(tiny, ids, tmp_path):
    seen, path = [], tmp_path / "new" / "folder" / "metrics.jsonl"
    run(tiny, ids, MetricsFile(path), seen.append)
    assert lines(path) == [vars(p) for p in seen]


def test_a_full_disk_names_the_file_of_metrics(tmp_path, tiny, ids):
    with pytest.raises(OSError, match=r"m\.jsonl"), largest_file(100):
        run(tiny, ids, MetricsFile(tmp_path / "m.jsonl"))


def test_a_new_run_begins_a_new_file(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    for _ in range(2):
        file.on_start(CONFIG, 0)
        file.on_step(progress(0))
    assert len(lines(file.path)) == 1


def test_a_file_without_metrics_is_not_replaced(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(NotOursError, match=r"notes\.txt exists and is not the metrics of a run"):
        MetricsFile(path)
    assert path.read_text() == "precious"
    MetricsFile(path, force=True).on_start(CONFIG, 0)
    assert path.read_text() == ""


def test_lines_are_there_at_once(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_start(CONFIG, 0)
    for step in range(3):
        file.on_step(progress(step))
        assert lines(file.path)[-1]["step"] == step


DAMAGED_ENDS = {
    "whole": b"",
    "half a line": b'{"step": 3, "lo',
    "half a line without its end": b'{"step": 3',
    "zeros, as after a power cut": bytes(50),
    "no text": b"\xff\xfe\n",
    "another line": b"3\n",
    "a list": b"[]\n",
    "a line without a step": b"{}\n",
    "a step that is none": b'{"step": null}\n',
    "an empty line": b"\n",
}


@pytest.mark.parametrize("name", DAMAGED_ENDS)
@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_resumed_run_keeps_what_it_will_not_write_again(tmp_path, name, first):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_start(CONFIG, 0)
    for step in range(3):
        file.on_step(progress(step))
    with file.path.open("ab") as opened:
        opened.write(DAMAGED_ENDS[name])
    MetricsFile(file.path).on_start(CONFIG, first)
    assert [line["step"] for line in lines(file.path)] == list(range(min(first, 3)))
    file.on_step(progress(first))
    assert lines(file.path)[-1]["step"] == first


def test_a_resumed_run_without_a_file_begins_one(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_start(CONFIG, 3)
    file.on_step(progress(3))
    assert [line["step"] for line in lines(file.path)] == [3]


def test_a_run_that_is_killed_while_it_resumes_keeps_its_file(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_start(CONFIG, 0)
    file.on_step(progress(0))
    before = file.path.read_bytes()

    def killed(path):
        assert file.path.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        file.on_start(CONFIG, 1)
    assert file.path.read_bytes() == before
    monkeypatch.setattr(module, "atomic_write", atomic_write)
    file.on_start(CONFIG, 1)
    assert file.path.read_bytes() == before


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN: other languages' readers would stop at the line."""
    file = MetricsFile(tmp_path / "m.jsonl")
    file.on_start(CONFIG, 0)
    file.on_step(progress(0, math.nan))
    file.on_step(progress(1, math.inf))

    def never(name):
        raise AssertionError(name)

    for line in file.path.read_text().splitlines():
        entry = json.loads(line, parse_constant=never)
        assert (entry["loss"], entry["losses"], entry["tokens"]) == (None, [1.0, None], 32)


# Others' packages


SCALARS = {
    "loss": 1.5,
    "gradient_norm": 0.25,
    "learning_rate": 0.1,
    "tokens_per_second": 1000.0,
    "tokens": 32.0,
    "skipped": 1.0,
    "loss/layer_0": 1.0,
    "loss/layer_2": 1.5,
}


class FakeWandB(types.ModuleType):
    """What of wandb is used, and what it was called with."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.runs = [], 0

    def init(self, **options):
        self.calls.append(("init", options))
        self.runs += options["id"] is None
        return types.SimpleNamespace(
            id=options["id"] or f"run-{self.runs}",
            log=lambda values, step: self.calls.append(("log", values, step)),
            finish=lambda: self.calls.append(("finish",)),
        )


def test_weights_and_biases(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    listener = WandB("project", "name")
    listener.on_start(CONFIG, 3)
    listener.on_step(progress(3))
    listener.on_end()
    assert fake.calls[0] == ("init", {"project": "project", "name": "name", "id": None, "config": CONFIG.to_dict(), "resume": "allow"})
    assert fake.calls[1:] == [("log", SCALARS, 3), ("finish",)]


def test_a_resumed_run_goes_on_in_weights_and_biases(tmp_path):
    fake, file = FakeWandB(), tmp_path / "new" / "wandb-run"
    for first_step in (0, 3, 0, 7):  # a new run in the old one's place is another one there too
        listener = WandB("project", run_file=file, module=fake)
        listener.on_start(CONFIG, first_step)
        listener.on_end()
    opened = [call[1]["id"] for call in fake.calls if call[0] == "init"]
    assert opened == [None, "run-1", None, "run-2"]
    assert file.read_text() == "run-2"


def test_weights_and_biases_of_a_run_that_did_not_start(tiny, tmp_path):
    fake = FakeWandB()
    with pytest.raises(ValueError, match="Not enough text"):
        run(tiny, mx.arange(20), WandB("project", module=fake), config=TrainingConfig(num_steps=9, max_seq_len=LENGTH, repeat=False))
    assert fake.calls == []


class FakeWriter:
    def __init__(self, folder=""):
        self.folder, self.calls, self.closed = folder, [], False

    def add_scalar(self, name, value, step):
        self.calls.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(monkeypatch, tmp_path):
    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    listener = TensorBoard(tmp_path)
    assert listener.writer.folder == str(tmp_path)
    listener.on_start(CONFIG, 0)
    listener.on_step(progress(5))
    assert listener.writer.calls == [(name, value, 5) for name, value in SCALARS.items()]
    assert not listener.writer.closed
    listener.on_end()
    assert listener.writer.closed


def test_both_in_a_run(tiny, ids):
    wandb, writer = FakeWandB(), FakeWriter()
    run(tiny, ids, WandB("project", module=wandb), TensorBoard("", writer=writer))
    assert [call[0] for call in wandb.calls] == ["init", "log", "log", "log", "log", "finish"]
    assert len(writer.calls) == 4 * 9
    assert writer.closed


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: WandB("p"), "wandb"), (lambda: TensorBoard("folder"), "tensorboardX")], ids=["wandb", "tensorboard"]
)
def test_a_missing_package_is_named(monkeypatch, make, name):
    original = builtins.__import__

    def absent(module, *args, **kwargs):
        if module == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(module, *args, **kwargs)

    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=rf"Reporting to {name} needs its package: pip install {name}\."):
        make()
