"""metalens eval with everything it can write, and metalens convert."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from metalens import TunedLens
from metalens.cli import main
from metalens.models.bundled import HELD_OUT_TEXT

FEW = ("--max-tokens", 60, "--max-seq-len", 30)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALENS_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    lens = TunedLens(8, 256)
    for i, translator in enumerate(lens.translators):
        translator.bias = 0.1 * mx.random.normal((256,), key=mx.random.key(i))
    path = tmp_path_factory.mktemp("lens") / "lens"
    lens.save(path)
    return path


def test_eval_writes_all_its_results(run, lens, tmp_path):
    result = run("eval", "demo", "--lens", lens, "--data", HELD_OUT_TEXT, *FEW, "--logit-stats", "--out", "new/results", "--save", "new/t.png")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "new" / "results").iterdir()) == ["aggregate_metrics.json", "evaluation.json", "logit_stats.npz"]
    found = json.loads((tmp_path / "new" / "results" / "evaluation.json").read_text())
    assert len(found["transfer"]["kl"]) == 8
    assert (tmp_path / "new" / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "transfer penalty" in result.stdout
    assert "bias" in result.stdout
    assert "entropy" not in result.stdout.splitlines()[2]


def test_eval_shows_entropy_on_request(run):
    result = run("eval", "demo", "--data", HELD_OUT_TEXT, *FEW, "--entropy")
    assert result.exit_code == 0, result.stderr
    assert "entropy" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer-transfer"], "give --lens"),
        (["--lens", "LENS", "--save", "out.nonsense"], "Can't write a picture"),
        (["--lens", "LENS", "--save", "file/out.png"], "Can't write"),
        (["--out", "file/results"], "Can't write"),
        (["--data", "nowhere"], "no file or folder"),
    ],
)
def test_eval_finds_mistakes_before_the_model_is_loaded(run, lens, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [str(lens) if a == "LENS" else a for a in arguments]
    result = run("eval", "no-such-model-anywhere", "--data", HELD_OUT_TEXT, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_eval_reads_several_files_as_one_corpus(run, tmp_path):
    (tmp_path / "a.txt").write_text("A first text, of some words.")
    (tmp_path / "b.jsonl").write_text('{"text": "A second one."}\n{"text": "And a third."}\n')
    result = run("eval", "demo", "--data", "a.txt", "b.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] > 12


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_lens_of_another_head_is_a_note_and_no_error(run, lens, tmp_path):
    other = TunedLens.load(lens)
    other.provenance = {"model": "another/model", "head": "sha256:0"}
    other.save(tmp_path / "other")
    result = run("lens", "demo", "A prompt", "--lens", "other", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    assert "Warning: The lens remembers another model" in result.stderr


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("to", [(), ("--to", "tuned-lens")])
def test_convert_there_and_back(run, lens, tmp_path, to):
    result = run("convert", lens, "theirs", *to, "--model", "owner/model")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "params.pt" in result.stderr
    assert "Warning: tuned-lens has no translator for the last block" in result.stderr
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["base_model_name_or_path"] == "owner/model"
    result = run("convert", "theirs", "back")
    assert result.exit_code == 0, result.stderr
    before, after = TunedLens.load(lens), TunedLens.load("back")
    assert after.provenance["model"] == "owner/model"
    for i in range(7):  # tuned-lens has no translator for the last layer
        np.testing.assert_allclose(np.array(before.dense(i)[0]), np.array(after.dense(i)[0]), atol=1e-6)
        assert mx.array_equal(before.dense(i)[1], after.dense(i)[1])


def test_convert_says_what_is_missing(run, lens):
    result = run("convert", "nothing", "out")
    assert result.exit_code == 1
    assert "No lens at nothing" in result.stderr
    result = run("convert", lens, "out")
    assert result.exit_code == 1
    assert "model" in result.stderr
