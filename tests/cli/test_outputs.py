"""Outputs replace what metalens wrote, other files with --force alone, and inputs never. Names are never empty, and '~' is the home."""

import os
import shutil
import subprocess
import sys

import pytest

from metalens import TunedLens
from metalens.models.bundled import HELD_OUT_TEXT, MODEL

SMALL = ("--recipe", "mlxterp", "--max-seq-len", 32, "--steps", 2)
FEW = ("--max-tokens", 40, "--max-seq-len", 20)


def refused(result, *words):
    assert result.exit_code == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_train_does_not_replace_the_configuration_of_a_model(run, text, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    refused(
        run("train", "demo", "--data", text, "--out", "model/config", *SMALL), "config.json exists and is not the description of a lens", "--force"
    )
    assert (tmp_path / "model" / "config.json").read_bytes() == (MODEL / "config.json").read_bytes()


def test_metrics_do_not_replace_notes_or_the_text(run, text, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    shutil.copy(text, tmp_path / "data.txt")
    train = ("train", "demo", "--out", "lens", *SMALL, "--data", "data.txt", "--metrics")
    refused(run(*train, "notes.txt"), "notes.txt exists and is not the metrics of a run")
    refused(run(*train, "data.txt", "--force"), "data.txt is read and would be replaced by the metrics of a run")
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert (tmp_path / "data.txt").read_bytes() == text.read_bytes()
    for options in ((), (), ("--force",)):  # metrics replace metrics
        assert run(*train, "m.jsonl", *options).exit_code == 0
    assert run(*train, "notes.txt", "--force").exit_code == 0
    assert len((tmp_path / "notes.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["x.npz", "./x.json"])
def test_metrics_are_no_file_of_the_lens(run, text, tmp_path, name):
    """The run trained to its end, and then had no place for the lens."""
    refused(run("train", "demo", "--data", text, "--out", "x", *SMALL, "--metrics", name), "is a file of the lens (--out)", "another path")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("out", [".", "..", "/", "folder/.."])
def test_an_output_needs_a_name(run, text, tmp_path, out):
    refused(run("train", "demo", "--data", text, "--out", out, *SMALL), "names no lens file", "my-lens")
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_early_leaves_no_empty_folder(run, text, tmp_path):
    refused(run("train", "demo", "--data", text, "--out", "x", "--recipe", "paper"), "Not enough text")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()  # a user's empty folder stays
    refused(run("train", "demo", "--data", text, "--out", "x", "--recipe", "paper", "--checkpoint-dir", "mine"), "Not enough text")
    assert os.listdir(tmp_path) == ["mine"]


def test_the_folder_of_a_converted_lens_is_no_file(run, lens, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    refused(run("convert", lens, "notes.txt", "--model", "m"), "notes.txt is a file", "Give the name of a folder")
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_convert_does_not_replace_a_model(run, lens, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    refused(run("convert", lens, "model", "--model", "m"), "config.json exists and is not the configuration of a tuned lens")
    assert not (tmp_path / "model" / "params.pt").exists()
    for _ in range(2):  # a lens replaces a lens
        assert run("convert", lens, "theirs", "--model", "m").exit_code == 0
    (tmp_path / "theirs" / "config.json").unlink()
    refused(run("convert", lens, "theirs", "--model", "m"), "params.pt exists and is not the weights of a tuned lens")
    assert run("convert", lens, "theirs", "--model", "m", "--force").exit_code == 0
    (tmp_path / "back.json").write_text("[]")
    refused(run("convert", "theirs", "back"), "back.json exists and is not the description of a lens")


def test_convert_does_not_replace_its_source(run, tmp_path):
    TunedLens(2, 3, rank=1).save(tmp_path / "low")
    refused(run("convert", "low", "low", "--to", "metalens", "--force"), "is read and would be replaced")
    assert TunedLens.load(tmp_path / "low").rank == 1


def test_eval_does_not_replace_others_results(run, lens, tmp_path):
    evaluation = ("eval", "demo", "--lens", lens, "--data", HELD_OUT_TEXT, *FEW, "--out", "results")
    assert run(*evaluation, "--logit-stats").exit_code == 0
    assert run(*evaluation).exit_code == 0
    assert sorted(os.listdir(tmp_path / "results")) == ["aggregate_metrics.json", "batches.jsonl", "evaluation.json"]  # no old statistics beside them
    for name in ("aggregate_metrics.json", "batches.jsonl", "evaluation.json", "logit_stats.npz"):
        (tmp_path / "results" / name).write_text('{"mine": 1}')
        refused(run(*evaluation), f"{name} exists and is not")
        assert (tmp_path / "results" / name).read_text() == '{"mine": 1}'
        assert run(*evaluation, "--force").exit_code == 0


@pytest.mark.parametrize("name", ["p.png", "p.svg", "p.pdf"])
def test_a_picture_replaces_pictures_alone(run, lens, tmp_path, name):
    picture = ("lens", "demo", "The", "--lens", lens, "--layers", "7", "--save", name)
    (tmp_path / name).write_text("notes of mine")
    refused(run(*picture), f"{name} exists and is not a picture")
    for options in (("--force",), ()):
        result = run(*picture, *options)
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "nowhere", "--lens", "LENS", "--data", HELD_OUT_TEXT, "--save"),
        ("eval", "nowhere", "--data", HELD_OUT_TEXT, "--curves"),
        ("analyze", "depth", "nowhere", "--data", HELD_OUT_TEXT, "--save"),
        ("lens", "nowhere", "The", "--save"),
    ],
    ids=["eval", "curves", "analyze", "lens"],
)
def test_what_is_no_picture_is_found_before_the_work(run, lens, tmp_path, command):
    """There is no such model, and no command gets as far as to ask for it."""
    (tmp_path / "p.png").write_text("notes of mine")
    refused(run(*(lens if word == "LENS" else word for word in command), "p.png"), "p.png exists and is not a picture")
    assert (tmp_path / "p.png").read_text() == "notes of mine"


def test_a_report_of_another_is_found_before_the_sweep(run, tmp_path):
    (tmp_path / "report.md").write_text("# my own notes")
    (tmp_path / "sweep.toml").write_text(
        '[[models]]\nname = "m"\nmodel = "nowhere"\n[[recipes]]\nname = "r"\nrecipe = "ridge"\n'
        f'[[texts]]\nname = "t"\ntrain = ["{HELD_OUT_TEXT}"]\nevaluate = ["{HELD_OUT_TEXT}"]\n'
    )
    refused(run("sweep", "sweep.toml", "--out", "."), "report.md exists and is not the report of a sweep")
    assert sorted(os.listdir(tmp_path)) == ["report.md", "sweep.toml"]


def test_a_picture_does_not_replace_the_lens(run, lens):
    name = str(lens) + ".png"
    os.symlink(str(lens) + ".npz", name)
    refused(run("lens", "demo", "The", "--lens", lens, "--save", name, "--force"), "is read and would be replaced")
    os.unlink(name)


def test_the_demo_does_not_replace_others_files(run, tmp_path):
    (tmp_path / "evaluation.json").write_text('{"mine": 1}')
    refused(run("demo", "--out", "."), "evaluation.json exists and is not an evaluation")
    (tmp_path / "evaluation.txt").write_text("mine")
    (tmp_path / "evaluation.json").unlink()
    refused(run("demo", "--out", "."), "evaluation.txt exists and is not the table of an evaluation")
    assert os.listdir(tmp_path) == ["evaluation.txt"]


@pytest.mark.parametrize(
    "command",
    [
        ("demo", "--out", ""),
        ("convert", "", "x"),
        ("convert", "x", ""),
        ("lens", "demo", "hi", "--lens", ""),
        ("lens", "demo", "hi", "--save", ""),
        ("train", "demo", "--data", "", "--out", "x"),
        ("train", "demo", "--data", "t", "--out", ""),
        ("train", "demo", "--data", "t", "--out", "x", "--metrics", ""),
        ("train", "demo", "--data", "t", "--out", "x", "--checkpoint-dir", ""),
        ("train", "demo", "--data", "t", "--out", "x", "--recipe", ""),
        ("eval", "demo", "--data", ""),
        ("eval", "demo", "--data", "t", "--out", ""),
    ],
)
def test_an_empty_name_is_an_error(run, tmp_path, command):
    (tmp_path / "t").write_text("words " * 100)
    result = run(*command)
    assert result.exit_code in (1, 2)
    assert "is empty" in result.stderr
    assert os.listdir(tmp_path) == ["t"]


def test_a_tilde_is_the_home_of_the_user(run, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = run("train", "demo", "--data", text, "--out=~/x", "--metrics=~/m.jsonl", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert os.listdir(tmp_path) == ["home"]
    assert sorted(os.listdir(tmp_path / "home")) == ["m.jsonl", "x.checkpoints", "x.json", "x.npz"]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_pipe_or_a_device_is_no_text(run, tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    out = ("--out", "x") if command == "train" else ()
    for name in ("pipe", "/dev/zero"):
        refused(run(command, "demo", "--data", name, *out), f"{name} is a pipe or a device", "Save it to a file")
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("stderr", ["full", "closed pipe"])
def test_a_broken_stderr_does_not_end_a_run(text, tmp_path, stderr):
    """The process ends as if nothing were wrong: with its lens, and with exit code 0. Python keeps what a stream has not taken, and tries again."""
    command = ["train", "demo", "--data", str(text), "--out", "lens", "--recipe", "mlxterp", "--max-seq-len", "16", "--steps", "12"]
    if stderr == "full":
        broken = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, broken = os.pipe()
        os.close(reader)
    run = "from metalens.cli import main; main()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run([sys.executable, "-c", run, *command], cwd=tmp_path, env=environment, stderr=broken, timeout=120, check=False)
    os.close(broken)
    assert process.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["lens.checkpoints", "lens.json", "lens.npz"]


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("stdout", ["pipe without a reader", "closed"])
def test_nobody_reads_the_results(tmp_path, options, stdout):
    """No traceback and no message: the reader has gone because it had enough."""
    run = "from metalens.cli import main; main()"
    command = [sys.executable, "-c", run, "lens", "demo", "hi", "--layers", "7", *options]
    if stdout == "closed":
        code = "import os, sys; os.close(1); os.execv(sys.executable, sys.argv[1:])"
        process = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
        os.close(writer)
    assert process.stderr.strip() == ""


def test_two_processes_with_one_output(text, tmp_path):
    """One of them trains, the other says who does; the lens is whole."""
    run = "from metalens.cli import main; main()"
    command = [sys.executable, "-c", run, "train", "demo", "--data", str(text), "--out", "lens", "--recipe", "mlxterp"]
    command += ["--max-seq-len", "16", "--steps", "40", "--checkpoint-every", "2"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted((process.communicate(timeout=300)[1], process.returncode) for process in both)
    codes = [code for _, code in said]
    if codes != [0, 0]:  # one may have ended before the other began
        assert sorted(codes) == [0, 1]
        (refusal,) = [text for text, code in said if code]
        assert "Error: Another run (pid " in refusal
    TunedLens.load(tmp_path / "lens")
    assert sorted(os.listdir(tmp_path)) == ["lens.checkpoints", "lens.json", "lens.npz"]
