"""metalens train in the small: its files, its text, its errors. test_train.py has its settings, checkpoints and signals."""

import numpy as np
import pytest
from click.testing import CliRunner

from metalens import TunedLens
from metalens.cli import main


@pytest.fixture(scope="module")
def lens(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("lens") / "demo-0.1"
    options = ["--recipe", "mlxterp", "--steps", "3", "--max-seq-len", "32", "--lr", "0.5"]
    result = CliRunner().invoke(main, ["train", "demo", "--data", str(text), "--out", str(out), *options])
    assert result.exit_code == 0, result.stderr
    return out


def test_train_writes_the_lens_and_keeps_stdout_empty(lens, text, run):
    assert TunedLens.load(lens).num_layers == 8
    result = run("train", "demo", "--data", text, "--out", lens.with_name("again"), "--recipe", "mlxterp", "--steps", "1", "--max-seq-len", 16)
    assert result.stdout == ""
    assert "Lens written" in result.stderr
    assert "tok/s" in result.stderr


def test_train_takes_several_files_after_one_data_option(text, tmp_path, run):
    other = tmp_path / "other.txt"
    other.write_text("Another text, about nothing at all. " * 10)
    out = tmp_path / "lens"
    options = ("--recipe", "mlxterp", "--steps", 1, "--tokens-per-step", 64, "--max-seq-len", 32, "--seed", 3)
    result = run("train", "demo", "--data", text, other, "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    assert TunedLens.load(out).hidden_dim == 256


def test_train_is_reproducible_and_depends_on_the_seed(text, tmp_path, run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--recipe", "mlxterp", "--steps", 2, "--max-seq-len", 24, "--seed", seed)
        result = run("train", "demo", "--data", text, "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.stderr
    weights = [np.load(tmp_path / f"{name}.npz")["translators_0_weight"] for name in "abc"]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_train_finds_an_unwritable_path_before_it_starts(text, tmp_path, run):
    (tmp_path / "file").write_text("")
    result = run("train", "no-such-model-anywhere", "--data", text, "--out", tmp_path / "file" / "lens")
    assert result.exit_code == 1
    assert "Can't write" in result.stderr  # and not a word about the model, which is loaded later


def test_empty_and_binary_files_are_refused_by_name(run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    for name, message in (("empty.txt", "is empty"), ("binary.txt", "not UTF-8")):
        result = run("train", "demo", "--data", tmp_path / name, "--out", tmp_path / "lens")
        assert result.exit_code == 1
        assert name in result.stderr
        assert message in result.stderr
    assert not (tmp_path / "lens.npz").exists()


def test_text_shorter_than_a_sequence_says_what_to_do(run, tmp_path):
    (tmp_path / "short.txt").write_text("Only a few words.")
    result = run("train", "demo", "--data", tmp_path / "short.txt", "--out", tmp_path / "lens")
    assert result.exit_code == 1
    assert "Dataset too small" in result.stderr
    assert "max_seq_len" in result.stderr
