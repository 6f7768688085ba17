"""metalens eval with everything it can write, in process on the bundled model."""

import json
import math

import pytest

import metalens
from metalens.models.bundled import HELD_OUT_TEXT
from metalens.models.plain_encoder import PlainEncoder
from metalens.training.data import readers

FEW = ("--max-tokens", 60, "--max-seq-len", 30)


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


def test_eval_writes_all_its_results(run, lens, tmp_path):
    result = run(
        "eval",
        "demo",
        "--lens",
        lens,
        "--data",
        HELD_OUT_TEXT,
        *FEW,
        "--logit-stats",
        "--out",
        "new/results",
        "--save",
        "new/t.png",
        "--curves",
        "new/c.png",
    )
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "new" / "results").iterdir()) == [
        "aggregate_metrics.json",
        "batches.jsonl",
        "evaluation.json",
        "logit_stats.npz",
    ]
    found = json.loads((tmp_path / "new" / "results" / "evaluation.json").read_text())
    assert len(found["transfer"]["kl"]) == 8
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")
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


def test_eval_reads_a_text_in_parts(run, tmp_path, monkeypatch, text):
    """No call of the tokenizer sees the whole file, and the scores are those of the whole string."""
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path / "cache"))
    content = text.read_text(encoding="utf-8")
    model = metalens.load("demo")
    whole = metalens.evaluate(model, content, max_seq_len=64, max_tokens=200)
    monkeypatch.setattr(readers, "BLOCK", 400)
    seen = []
    encode = PlainEncoder.encode
    monkeypatch.setattr(PlainEncoder, "encode", lambda self, texts: seen.extend(map(len, texts)) or encode(self, texts))
    result = run("eval", "demo", "--data", text, "--max-seq-len", 64, "--max-tokens", 200, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(content) > 2000
    assert max(seen) <= 800
    found = json.loads(result.stdout)
    assert found["bytes_per_token"] == pytest.approx(whole.bytes_per_token, rel=1e-12)
    assert found["model"] == pytest.approx(vars(whole.model), rel=1e-6)
    assert [layer["logit"]["kl"] for layer in found["layers"]] == pytest.approx([scores.kl for scores in whole.logit], rel=1e-6, abs=1e-9)


def test_eval_leaves_layers_out_that_the_lens_does_not_translate(run, tmp_path):
    lens = metalens.TunedLens(8, 256, layers=(1, 5))
    lens.save(tmp_path / "few")
    result = run("eval", "demo", "--lens", "few", "--data", HELD_OUT_TEXT, *FEW, "--save", "t.png")
    assert result.exit_code == 0, result.stderr
    assert "The 2 layers that the lens translates." in " ".join(result.stdout.split())
