"""metalens train, in process on the bundled model, and as a process of its own where signals matter."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens
from metalens.cli import main
from metalens.cli.settings import given_settings
from metalens.lenses.provenance import provenance_of
from metalens.models.bundled import HELD_OUT_TEXT, MODEL
from metalens.training import TrainingConfig, recipe
from metalens.training.settings import resolve
from metalens.utils.errors import InvalidValueError
from support.machines import machine

# One sequence of 32 tokens per step.
SMALL = ("--recipe", "mlxterp", "--max-seq-len", 32)


@pytest.fixture
def train(run, text):
    """metalens train demo --data TEXT --out lens ..., which must succeed."""

    def trained(*args, code=0):
        result = run("train", "demo", "--data", text, "--out", "lens", *args)
        assert result.exit_code == code, result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        return result.stderr

    return trained


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(HELD_OUT_TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return file


def weights(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ settings


def test_every_field_is_an_option():
    names = {parameter.name for parameter in main.commands["train"].params}
    assert set(TrainingConfig.__dataclass_fields__) <= names
    assert set(TrainingConfig.__dataclass_fields__) <= {parameter.name for parameter in main.commands["plan"].params}


def test_options_have_the_types_choices_and_help_of_the_settings():
    options = {parameter.name: parameter for parameter in main.commands["train"].params}
    for field in dataclasses.fields(TrainingConfig):
        assert options[field.name].help.startswith(field.metadata["help"])
        assert options[field.name].default is None
    assert options["optimizer"].type.choices == ("sgd", "adam", "muon")
    assert [options[name].opts for name in ("num_steps", "learning_rate", "layers_at_once")] == [["--steps"], ["--lr"], ["--layers-at-once"]]
    assert (options["repeat"].secondary_opts, options["bias_only"].is_flag, options["warmup_steps"].type.min) == (["--no-repeat"], True, 0)


def test_options_are_settings():
    given = given_settings({"num_steps": 9, "seed": "none", "momentum": None})
    assert resolve("adam", None, given)[1] == recipe("adam", num_steps=9, seed=None, repeat=False, max_seq_len=512)


def test_the_old_spelling_of_parallel_is_accepted_and_not_shown(run, text):
    assert "--share" not in run("train", "--help").output
    assert "--parallel [data|layers]" in run("train", "--help").output
    result = run("train", "demo", "--data", text, "--out", "lens", *SMALL, "--steps", 1, "--share", "layers")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "secret"], 1, "Unknown recipe 'secret'"),
        (["--layers", "4-2"], 2, "is not a list of layer numbers"),
        (["--seed", "some"], 2, "neither a number nor 'none'"),
        (["--vocabulary", "half"], 2, "neither a number nor 'full' or 'sampled'"),
        (["--vocabulary", "15"], 1, "vocabulary must be at least 16"),
        (["--rank", "4", "--bias-only"], 1, "rank or bias_only, not both"),
        (["--data", "nowhere.txt"], 1, "no file or folder nowhere.txt"),
        (["--data", "nowhere"], 1, "no file or folder nowhere"),
        (["--metrics", "text/metrics.jsonl"], 1, "Can't write"),
        (["--wandb", "project"], 1, "pip install wandb"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(run, tmp_path, text, monkeypatch, arguments, code, message):
    (tmp_path / "text").write_text("a file")
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = run("train", "no-such-model-anywhere", "--data", text, "--out", "lens", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------ text


def test_too_little_text_says_what_is_missing_and_what_would_fit(train):
    message = train("--recipe", "muon", "--steps", 24, "--tokens-per-step", 64, "--max-seq-len", 32, code=1)
    assert "24 steps of 64 tokens need 1536 tokens" in message
    assert "--repeat" in message
    options = message.split("one of: ")[1].split(";")
    assert [option.split()[0] for option in options[:2]] == ["--tokens", "--tokens-per-step"]  # fewer steps of the same size are no advice
    start = ("--recipe", "muon", "--steps", 24, "--tokens-per-step", 64, "--max-seq-len", 32)
    train(*start, *options[0].split())
    budget = int(options[0].split()[1])
    assert f"--tokens {budget};" in train(*start, "--tokens", round(1.1 * budget), code=1)
    train(*start, *options[1].split())
    train(*start, "--repeat")


def test_a_warm_start_that_takes_all_text_is_what_to_change(train):
    small = ("--recipe", "adam", "--steps", 4, "--tokens-per-step", 64, "--max-seq-len", 32)
    message = train(*small, "--warm-start-tokens", 5000, code=1)
    assert "5000 tokens of the warm start" in message
    option = message.split("one of: ")[1].split(";")[0].split()
    assert option[0] == "--tokens"
    train(*small, "--warm-start-tokens", 5000, *option)


def test_the_default_recipe_never_repeats_a_small_text(train):
    message = train(code=1)
    assert "Not enough text" in message
    train(*message.split("one of: ")[1].split(";")[0].split())  # the budget that it names


def test_folders_and_json_lines(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("Some text that is long enough for a sequence of ten tokens or so. " * 3)
    (tmp_path / "b.jsonl").write_text('{"content": "And another one, which has no fewer words than the first one had."}\n' * 9)
    options = ("--out", "lens", *SMALL, "--steps", 2, "--field", "content", "--join", "packed", "--cache-dir", "cache")
    result = run("train", "demo", "--data", "folder", "b.jsonl", *options)
    assert result.exit_code == 0, result.stderr
    assert list((tmp_path / "cache").glob("*.ids"))
    assert TunedLens.load("lens").provenance["training"]["data"]["documents"] == 10


def test_of_a_hub_data_set_no_more_is_read_than_the_run_needs(run, monkeypatch):
    asked = {}

    def open_corpus(sources, tokenizer, **how):
        asked.update(how, sources=sources)
        raise InvalidValueError("enough seen")

    monkeypatch.setattr("metalens.training.settle.open_corpus", open_corpus)
    result = run("train", "demo", "--data", "hf:owner/name@main", "--out", "lens", *SMALL, "--steps", 5, "--split", "test")
    assert "enough seen" in result.stderr
    assert [source.name for source in asked["sources"]] == ["owner/name@main (test)"]
    assert (asked["split"], asked["max_tokens"]) == ("test", 5 * 32 + 6 * 32)


# ------------------------------------------------------------------ budgets, and what a run takes


def test_a_budget_in_tokens(train):
    train("--tokens", 900, "--layers", 0)
    training = TunedLens.load("lens").provenance["training"]
    assert (training["warm_start_tokens"], training["num_steps"], training["tokens_per_step"]) == (423, 3, 128)


def test_before_it_starts_a_run_says_what_it_takes(train, monkeypatch):
    monkeypatch.setattr("metalens.estimate.run_time.measured_speed", lambda _: machine(2e-9, 1e11, 1e11))
    message = train(*SMALL, "--steps", 2)
    assert re.search(r"The run takes about 64 tokens, 1 s on this machine, \d+ MB of memory\.\n", message)  # the model is loaded
    assert message.index("The run takes") < message.index("training the lens")
    monkeypatch.setattr("metalens.estimate.run_time.measured_speed", lambda _: machine(8e-5, 1e9, 1e9))
    message = train(*SMALL, "--steps", 40, "--repeat")
    assert re.search(r"1,280 tokens, \d+(\.\d hours| min) on this machine, .* of memory\. --tokens \d+ would take ten minutes\.", message)


def test_a_model_of_unknown_shape_is_trained_without_that_line(train, monkeypatch):
    def unknown(*args, **kwargs):
        raise InvalidValueError("does not say 'hidden_size'")

    monkeypatch.setattr("metalens.estimate.memory.facts_of", unknown)
    assert "The run takes" not in train(*SMALL, "--steps", 1)


# ------------------------------------------------------------------ what a run leaves


def test_the_lens_remembers_its_training(train):
    train(*SMALL, "--steps", 3, "--lr", 0.25)
    origin = TunedLens.load("lens").provenance
    model = InterpretableModel(str(MODEL))
    assert origin["model"] == str(MODEL)
    assert origin["head"] == provenance_of(model.unembed)["head"]
    assert origin["recipe"] == "mlxterp"
    assert origin["tokens"] == 96
    assert origin["training"]["learning_rate"] == 0.25
    assert origin["training"]["data"]["tokens"] > 500


def test_variants_and_some_layers(train):
    train(*SMALL, "--steps", 2, "--rank", 4, "--layers", "1,3-4")
    lens = TunedLens.load("lens")
    assert (lens.variant, lens.rank, lens.layers) == ("low-rank", 4, [1, 3, 4])
    train(*SMALL, "--steps", 2, "--bias-only", "--dtype", "bfloat16", "--layers-at-once", 3)
    lens = TunedLens.load("lens")
    assert (lens.variant, lens.layers) == ("bias", list(range(8)))
    assert lens.provenance["tokens"] == 64  # of each layer


def test_a_lens_goes_on(train):
    train(*SMALL, "--steps", 2, "--layers", "0,3")
    first = TunedLens.load("lens")
    assert "no warm start" in train("--from", "lens", "--out", "second", "--warm-start-tokens", 64, "--tokens", 500, code=1)
    train(*SMALL, "--from", "lens", "--steps", 2, "--layers", 3, "--out", "second")
    second = TunedLens.load("second")
    assert (second.layers, second.provenance["training"]["start_from"]["path"]) == ([0, 3], "lens")
    same = [np.array_equal(np.array(a.weight), np.array(b.weight)) for a, b in zip(first.translators, second.translators, strict=True)]
    assert same == [layer != 3 for layer in range(8)]


def test_metrics_and_weights_and_biases(train, tmp_path, monkeypatch):
    logged = []
    wandb = types.SimpleNamespace(
        init=lambda **_: types.SimpleNamespace(id="its-id", log=lambda values, step: logged.append(step), finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(*SMALL, "--steps", 3, "--metrics", "new/metrics.jsonl", "--wandb", "project")
    assert [json.loads(line)["step"] for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()] == logged == [0, 1, 2]


def test_checkpoints_of_a_finished_run_make_way(train, tmp_path):
    train(*SMALL, "--steps", 4, "--checkpoint-every", 2)
    assert sorted(p.name for p in (tmp_path / "lens.checkpoints").iterdir()) == ["finished", "step-00000002", "step-00000004"]
    first = weights("lens.npz")
    (tmp_path / "lens.npz").unlink()
    message = train(*SMALL, "--steps", 4, "--resume")
    assert "This run had finished" in message
    assert equal(weights("lens.npz"), first)
    assert TunedLens.load("lens").provenance["tokens"] == 128
    assert "num_steps was 4 and is 3" in train(*SMALL, "--steps", 3, "--resume", code=1)
    train(*SMALL, "--steps", 3)
    assert [p.name for p in (tmp_path / "lens.checkpoints").glob("step-*")] == ["step-00000003"]


def test_checkpoints_of_an_unfinished_run_are_kept(train, tmp_path):
    train(*SMALL, "--steps", 2, "--checkpoint-dir", "state")
    (tmp_path / "state" / "finished").unlink()
    message = train(*SMALL, "--steps", 2, "--checkpoint-dir", "state", code=1)
    assert "--resume" in message
    assert (tmp_path / "state" / "step-00000002").exists()


# ------------------------------------------------------------------ Ctrl-C


@pytest.fixture
def start(tmp_path):
    """metalens train in a process of its own, once it trains."""
    processes = []

    def started(*args, before=""):
        command = [
            sys.executable,
            "-c",
            f"{before}\nfrom metalens.cli import main; main()",
            "train",
            "demo",
            "--out",
            "lens",
            "--metrics",
            "metrics.jsonl",
            *args,
        ]
        processes.append(subprocess.Popen([str(a) for a in command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ)))
        wait_for((tmp_path / "metrics.jsonl").exists)
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition):
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_ctrl_c_ends_a_run_that_can_be_resumed(start, train, tmp_path, text):
    options = (*SMALL, "--steps", 24, "--repeat", "--seed", 1)
    process = start("--data", text, *options)
    wait_for(lambda: len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 2)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "Stopping. Press Ctrl-C again" in stderr
    assert "--resume" in stderr
    assert not (tmp_path / "lens.npz").exists()
    message = train(*options, "--metrics", "metrics.jsonl", "--resume")
    assert "Going on after step" in message
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(24))
    resumed, origin = weights("lens.npz"), TunedLens.load("lens").provenance
    train(*options)
    assert equal(weights("lens.npz"), resumed)
    assert TunedLens.load("lens").provenance == origin


# Forward passes that take long, once the run trains.
SLOW = """
import os, time
from metalens.models.capture import ResidualCapture
capture = ResidualCapture.capture
ResidualCapture.capture = lambda *args, **options: time.sleep({seconds} * os.path.exists("metrics.jsonl")) or capture(*args, **options)
"""


def test_a_second_ctrl_c_ends_it_at_once(start, tmp_path):
    process = start("--data", HELD_OUT_TEXT, "--recipe", "mlxterp", "--steps", 1, "--tokens-per-step", 32768, before=SLOW.format(seconds=60))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=20)  # a forward pass takes longer
    assert process.returncode == 130
    assert not list((tmp_path / "lens.checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("arguments", "kept"), [(("--steps", 1, "--tokens-per-step", 16384), "nothing to keep"), (("--recipe", "fast"), "within the warm start")]
)
def test_ctrl_c_is_answered_within_a_step_and_within_the_warm_start(start, tmp_path, arguments, kept):
    process = start("--data", HELD_OUT_TEXT, "--recipe", "mlxterp", *arguments, "--repeat", before=SLOW.format(seconds=2))
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]  # what is left would take more than that
    assert process.returncode == 130, stderr
    assert kept in stderr
    assert "--resume" in stderr
