"""The bundled model and texts are what the documentation says of them. The demo itself is run by CI as a user runs it, and checked there."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from matplotlib.figure import Figure
from mlx_lm import load

from metalens import InterpretableModel, TunedLens, accelerate
from metalens.cli import demo
from metalens.cli.demo import CONFIG
from metalens.display import figures
from metalens.display.tables import closed_form_table
from metalens.models.bundled import ASSETS, HELD_OUT_TEXT, MODEL, TRAINING_TEXT


@pytest.fixture(scope="module")
def model():
    model = InterpretableModel(str(MODEL))
    accelerate(model.model)
    return model


def test_assets_have_the_sizes_promised():
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 6e6
    assert 0.9e6 <= TRAINING_TEXT.stat().st_size <= 1.2e6
    assert 0.18e6 <= HELD_OUT_TEXT.stat().st_size <= 0.25e6
    assert "license" in (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_mlx_lm_opens_the_model_as_it_is():
    model, tokenizer = load(str(MODEL))
    config = json.loads((MODEL / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4}
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert tokenizer.decode(tokenizer.encode("Word for word, it comes back.")) == "Word for word, it comes back."


def test_held_out_paragraphs_are_not_in_the_training_text():
    paragraphs = [p for p in HELD_OUT_TEXT.read_text(encoding="utf-8").split("\n") if len(p) > 80]
    seen = set(TRAINING_TEXT.read_text(encoding="utf-8").split("\n"))
    assert len(paragraphs) > 100
    assert not seen.intersection(paragraphs)


def test_the_model_has_learnt_english(model):
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")[:4000]
    ids = model.ids(text)[:, :256]
    nats = nn.losses.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="mean").item()
    bits_per_byte = nats / math.log(2) * ids.size / len(model.decode(ids).encode())
    assert bits_per_byte < 1.6  # about 2.2 for a unigram model, 8 for none


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setattr(demo, "CONFIG", replace(CONFIG, num_steps=4, max_seq_len=32, tokens_per_step=64, warm_start_tokens=1024))
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 96)


@pytest.mark.usefixtures("_short")
def test_a_short_demo_trains_evaluates_and_reads(model):
    result = demo.run(model)
    assert result.evaluation.tokens == 96
    assert result.evaluation.tuned is not None
    assert sum(s.kl for s in result.evaluation.tuned) < sum(s.kl for s in result.evaluation.logit)
    assert result.tuned.model_tokens == result.logit.model_tokens
    assert mx.array_equal(result.tuned.model.lse, result.logit.model.lse)


@pytest.mark.usefixtures("_short")
def test_the_command_writes_its_results_into_a_folder(run, tmp_path):
    result = run("demo", "--out", "demo")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == [
        "evaluation.json",
        "evaluation.txt",
        "lens.json",
        "lens.npz",
        "lenses.png",
        "logit_lens.png",
        "tuned_lens.png",
    ]
    assert json.loads((tmp_path / "demo" / "evaluation.json").read_text())["tokens"] == 96
    for shown in (result.stdout, (tmp_path / "demo" / "evaluation.txt").read_text(encoding="utf-8")):
        assert "tuned lens" in shown
    assert "metalens lens demo" in result.stderr


def test_a_demo_of_another_model_measures_the_closed_form_too(model, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAINED_HELD_OUT_TOKENS", 96)
    monkeypatch.setattr(demo, "PRETRAINED_LENGTH", 32)
    monkeypatch.setattr(demo, "PRETRAINED_WARM_START", 4096)
    result = demo.run_on(model, minutes=0.05)
    assert result.evaluation.tokens == result.ridge.tokens == 96
    assert [layer.kl for layer in result.evaluation.logit] == [layer.kl for layer in result.ridge.logit]
    assert result.lens.provenance["training"]["num_steps"] > 0
    assert result.ridge.tuned[-1].kl < 1e-4 < abs(result.ridge.tuned[0].kl - result.evaluation.tuned[0].kl)
    table = closed_form_table(result.evaluation, result.ridge)
    assert table.row_count == len(result.evaluation.logit) + 1


def test_a_demo_on_a_slow_machine_still_has_a_closed_form_and_steps(model, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAINED_HELD_OUT_TOKENS", 64)
    monkeypatch.setattr(demo, "PRETRAINED_LENGTH", 32)
    result = demo.run_on(model, minutes=1e-4)
    settings = result.lens.provenance["training"]
    assert settings["warm_start_tokens"] >= 32
    assert settings["num_steps"] >= 1
    assert settings["num_steps"] * settings["tokens_per_step"] + settings["warm_start_tokens"] <= 4 * 32


def check(tmp_path, *layers):
    """Return the exit code of CI's check of a demo with these (KL of the logit lens, KL of the tuned lens) of each layer."""
    found = [{"layer": i, "logit": {"kl": logit, "ce": 1.0}, "tuned": {"kl": tuned, "ce": 1.0}} for i, (logit, tuned) in enumerate(layers)]
    (tmp_path / "evaluation.json").write_text(json.dumps({"layers": found}))
    command = [sys.executable, str(Path(__file__).parents[2] / "tools" / "check_demo.py"), str(tmp_path / "evaluation.json")]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_ci_s_check_of_a_demo(tmp_path):
    assert check(tmp_path, (3.0, 1.0), (2.0, 0.9), (0.0, 0.0)) == 0
    assert check(tmp_path, (3.0, 1.0), (2.0, 2.0), (0.0, 0.0)) == 1  # a layer that is not better
    assert check(tmp_path, (3.0, 2.0), (2.0, 1.0), (0.0, 0.0)) == 1  # the mean is more than half
    assert check(tmp_path, (3.0, 1.0), (2.0, math.nan), (0.0, 0.0)) == 1
    assert check(tmp_path, (math.inf, 1.0), (2.0, 0.9), (0.0, 0.0)) == 1
    assert check(tmp_path, (3.0, 1.0), (2.0, 0.9), (0.0, 0.1)) == 1  # the last layer is the model's own answer


def test_the_picture_of_both_lenses_has_few_layers_and_the_last(model, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "readings_figure", lambda readings, title: drawn.append(readings) or Figure())
    monkeypatch.setattr(demo, "PICTURE_LAYERS", 3)
    demo._draw_both(model, TunedLens(8, 256), "The", tmp_path / "lenses.png", False)
    ((logit, tuned),) = [tuple(each.values()) for each in drawn]
    assert logit.layers == tuned.layers == [7, 4, 1]
    assert (logit.lens, tuned.lens) == ("logit lens", "tuned lens")
