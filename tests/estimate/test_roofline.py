"""The roofline: what is counted, and what the command says."""

import json

import pytest
from click.testing import CliRunner

from metalens.cli import main
from metalens.estimate import roofline
from metalens.estimate.roofline import CHIPS, MODELS, Dimensions, bounds, dimensions
from metalens.models import bundled
from metalens.ops.metal import cost
from metalens.ops.metal.cost import Cost


def test_a_kernel_takes_the_longer_of_two_times():
    chip = CHIPS["M1-Max"]
    assert chip.seconds(Cost(0, 8_446_875_000_000, 1)) == pytest.approx(1.0)  # 10.6 TFLOP/s at 102 of 128
    assert chip.seconds(Cost(0, 1, 400_000_000_000)) == pytest.approx(1.0)
    assert chip.seconds(Cost(1, 0, 0)) * chip.matrix_flops == 1024


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_no_bound_may_say(chip, model):
    large, one = bounds(model, chip, 512), bounds(model, chip, 1)
    least = 2 * model.vocab * model.depth * model.layers / chip.matrix_flops  # the product alone, nothing padded
    assert 0.85 / least < large["statistics, metalens"] < 1 / least
    assert 0.40 / least < large["training, metalens"] < 0.5 / least
    # Fewer bytes and the same products: fusing must not look worse than not fusing, and is no miracle either.
    for task in ("statistics", "training"):
        assert 1 <= large[f"{task}, metalens"] / large[f"{task}, plain MLX"] < 1.6
    assert large["training and forward, metalens"] < min(large["training, metalens"], large["the model's forward pass"])
    assert one["statistics, metalens"] <= large["statistics, metalens"] * 1.001


def test_few_rows_are_bound_by_reading_the_head():
    small = Dimensions(4, 2048, 128256, 4, 64, 10**9)  # four layers and the model: five rows
    chip = CHIPS["M2"]
    assert 1 / bounds(small, chip, 1)["statistics, metalens"] == pytest.approx(small.head_bytes / 100e9, rel=0.01)


def test_bytes_of_a_packed_head():
    assert cost.weight_bytes(1000, 4096, 4, 64, 4) == 1000 * 4096 * 4.5 / 8
    assert cost.weight_bytes(1000, 4096, 16, 0, 4) == 1000 * 4096 * 2


def test_dimensions_of_the_presets():
    d = MODELS["Llama-3.1-8B-4bit"]
    assert (d.layers, d.depth, d.vocab) == (32, 4096, 128256)
    assert d.body == pytest.approx(6.98e9, rel=0.01)  # 8.03 billion less embedding and head


def test_dimensions_of_a_folder(tmp_path):
    d = dimensions(str(bundled.MODEL))
    assert (d.layers, d.vocab, d.bits) == (8, json.loads((bundled.MODEL / "config.json").read_text())["vocab_size"], 4)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2, "hidden_size": 64}')
    with pytest.raises(ValueError, match="does not say 'vocab_size'"):
        dimensions(str(tmp_path))
    with pytest.raises(ValueError, match="no folder with a config.json and none of Llama"):
        dimensions("nowhere")
    nested = {"text_config": {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert (dimensions(str(tmp_path)).layers, dimensions(str(tmp_path)).bits) == (2, 16)


def test_the_command_says_that_it_is_a_model():
    done = CliRunner().invoke(main, ["roofline", "Llama-3.1-8B-4bit", "--chip", "M2-Max", "--chip", "M4"])
    assert done.exit_code == 0, done.output
    assert "not a measurement" in done.stderr
    assert "M2-Max" in done.stdout
    assert "training, plain MLX" in done.stdout


def test_the_command_as_json():
    done = CliRunner().invoke(main, ["roofline", "demo", "--chip", "M1", "--tokens", "64", "--json"])
    found = json.loads(done.stdout)
    assert "not a measurement" in found["what"]
    assert found["tokens per second at most"]["M1"] == pytest.approx(bounds(dimensions(str(bundled.MODEL)), CHIPS["M1"], 64))


def test_unknown_models_and_chips():
    done = CliRunner().invoke(main, ["roofline", "nowhere"])
    assert done.exit_code == 1
    assert "config.json" in done.stderr
    assert CliRunner().invoke(main, ["roofline", "demo", "--chip", "H100"]).exit_code == 2


def test_every_chip_says_who_published_its_numbers():
    assert all(chip.source and chip.family for chip in roofline.CHIPS.values())
