"""The command line, run in process on the bundled model; stdout and stderr kept apart, as scripts see them."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from metalens import TunedLens
from metalens.cli import main
from metalens.models.bundled import HELD_OUT_TEXT

PROMPT = "The free software movement"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALENS_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture
def run():
    def invoke(*args):
        return CliRunner().invoke(main, [str(a) for a in args])

    return invoke


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(HELD_OUT_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


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


def test_eval_prints_json_alone(lens, text, run):
    result = run("eval", "demo", "--lens", lens, "--data", text, "--max-tokens", 100, "--max-seq-len", 50, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == 100
    assert [layer["layer"] for layer in answer["layers"]] == list(range(8))
    for layer in answer["layers"]:
        for name in ("logit", "tuned"):
            assert set(layer[name]) == {"kl", "ce", "entropy", "kl_bits_per_byte", "bits_per_byte", "entropy_bits_per_byte", "top1"}
            assert all(math.isfinite(v) for v in layer[name].values())
    assert answer["layers"][-1]["logit"]["ce"] == pytest.approx(answer["model"]["ce"], abs=1e-5)
    assert answer["layers"][-1]["logit"]["kl"] == pytest.approx(0, abs=1e-5)


def test_eval_prints_a_table(lens, text, run):
    result = run("eval", "demo", "--lens", lens, "--data", text, "--max-tokens", 40)
    assert result.exit_code == 0, result.stderr
    assert "logit lens" in result.stdout
    assert "tuned lens" in result.stdout
    assert "mean" in result.stdout


def test_eval_without_a_lens_reads_the_logit_lens_alone(text, run):
    result = run("eval", "demo", "--data", text, "--max-tokens", 40, "--json")
    assert result.exit_code == 0, result.stderr
    assert all(set(layer) == {"layer", "logit"} for layer in json.loads(result.stdout)["layers"])
    assert "tuned" not in run("eval", "demo", "--data", text, "--max-tokens", 40).stdout


def test_lens_prints_json_alone(run):
    result = run("lens", "demo", PROMPT, "--layers", "0,4", "--top-k", 2, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "".join(answer["tokens"]) == PROMPT
    assert set(answer["layers"]) == {"0", "4"}
    for positions in answer["layers"].values():
        assert len(positions) == len(answer["tokens"])
        for best in positions:
            (id0, score0, text0), (_, score1, _) = best
            assert isinstance(id0, int)
            assert isinstance(text0, str)
            assert score0 >= score1


def test_lens_without_a_tuned_lens_is_the_logit_lens(run, tmp_path):
    TunedLens(8, 256).save(tmp_path / "identity")
    plain = json.loads(run("lens", "demo", PROMPT, "--json").stdout)
    identity = json.loads(run("lens", "demo", PROMPT, "--lens", tmp_path / "identity", "--json").stdout)
    for layer in plain["layers"]:
        scores = [np.array([[s for _, s, _ in best] for best in answer["layers"][layer]]) for answer in (plain, identity)]
        np.testing.assert_allclose(*scores, atol=1e-3)


@pytest.mark.parametrize("color", ["probability", "entropy"])
def test_lens_saves_a_picture_beside_the_table(run, lens, tmp_path, color):
    picture = tmp_path / "new" / "out.png"
    result = run("lens", "demo", PROMPT, "--lens", lens, "--save", picture, "--color", color)
    assert result.exit_code == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "layer 7" in result.stdout
    assert "model" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lens", "demo", ""], "no tokens"),
        (["lens", "demo", PROMPT, "--top-k", "0"], "top_k must be from 1 to 6000"),
        (["lens", "demo", PROMPT, "--top-k", "6001"], "top_k must be from 1 to 6000"),
        (["lens", "demo", PROMPT, "--layers", "0,8"], "no layer 8"),
        (["lens", "demo", PROMPT, "--lens", "nowhere/lens"], "No lens at"),
        (["lens", "demo", PROMPT, "--save", "out.nonsense"], "Can't write a picture"),
    ],
)
def test_bad_input_gives_one_clear_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_list_of_layers_is_a_usage_error(run):
    result = run("lens", "demo", PROMPT, "--layers", "first")
    assert result.exit_code == 2
    assert "not a list of layer numbers" in result.stderr


def test_a_lens_of_another_model_is_refused(run, tmp_path, text):
    TunedLens(4, 64).save(tmp_path / "other")
    for command in (["lens", "demo", PROMPT, "--lens", tmp_path / "other"], ["eval", "demo", "--lens", tmp_path / "other", "--data", text]):
        result = run(*command)
        assert result.exit_code == 1
        assert "4 layers of width 64; the model has 8 of width 256" in result.stderr


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


def test_doctor_reports_a_working_installation(run):
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["problems"]
    assert found["native_problem"] == ""
    assert found["native"]["instruction_set"] in found["native"]["available_instruction_sets"]
    assert found["mlx"] == mx.__version__
    table = run("doctor")
    assert "instruction set" in table.stdout
    assert "Everything works" in table.stderr
