"""The roofline: what is counted, and what the command says."""

import json
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from metalens.cli import main
from metalens.estimate.chips import CHIPS
from metalens.estimate.roofline import bounds
from metalens.models import bundled
from metalens.models.facts import KNOWN_MODELS, ModelDimensions, dimensions_of
from metalens.ops.metal import cost
from metalens.ops.metal.cost import Cost


def test_a_kernel_takes_the_longer_of_two_times():
    chip = CHIPS["M1-Max"]
    assert chip.seconds(Cost(0, 8_446_875_000_000, 1)) == pytest.approx(1.0)  # 10.6 TFLOP/s at 102 of 128
    assert chip.seconds(Cost(0, 1, 400_000_000_000)) == pytest.approx(1.0)
    assert chip.seconds(Cost(1, 0, 0)) * chip.matrix_flops == 1024


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("model", KNOWN_MODELS.values(), ids=KNOWN_MODELS)
def test_what_no_bound_may_say(chip, model):
    large, one = bounds(model, chip, 512), bounds(model, chip, 1)
    least = 2 * model.vocab_size * model.hidden_size * model.num_layers / chip.matrix_flops  # the product alone, nothing padded
    assert 0.85 / least < large.statistics < 1 / least
    assert 0.40 / least < large.training < 0.5 / least
    # Fewer bytes and the same products: fusing must not look worse than not fusing, and is no miracle either.
    assert 1 <= large.statistics / large.statistics_plain_mlx < 1.6
    assert 1 <= large.training / large.training_plain_mlx < 1.6
    assert large.training_and_forward < min(large.training, large.forward)
    assert one.statistics <= large.statistics * 1.001
    # A sample of 12 sqrt(V) ids: far less work than all ids, but no less than the model's own rows with all of them.
    assert 4 * large.training < large.sampled_training < chip.matrix_flops / (2 * model.vocab_size * model.hidden_size)
    assert large.training_and_forward < large.sampled_training_and_forward < min(large.sampled_training, large.forward)


def test_few_rows_are_bound_by_reading_the_head():
    small = ModelDimensions(4, 2048, 128256, 4, 64, 10**9)  # four layers and the model: five rows
    chip = CHIPS["M2"]
    assert 1 / bounds(small, chip, 1).statistics == pytest.approx(small.head_bytes / 100e9, rel=0.01)


def test_bytes_of_a_packed_head():
    assert cost.weight_bytes(1000, 4096, 4, 64, 4) == 1000 * 4096 * 4.5 / 8
    assert cost.weight_bytes(1000, 4096, 16, 0, 4) == 1000 * 4096 * 2


def test_the_command_says_that_it_is_a_model():
    done = CliRunner().invoke(main, ["roofline", "Llama-3.1-8B-4bit", "--chip", "M2-Max", "--chip", "M4"])
    assert done.exit_code == 0, done.output
    assert "not a measurement" in done.stderr
    assert "M2-Max" in done.stdout
    assert "training, plain MLX" in done.stdout


def test_the_command_as_json():
    done = CliRunner().invoke(main, ["roofline", "demo", "--chip", "M1", "--batch-tokens", "64", "--json"])
    found = json.loads(done.stdout)
    assert "not a measurement" in found["note"]
    assert found["tokens_per_second"]["M1"] == pytest.approx(asdict(bounds(dimensions_of(str(bundled.MODEL)), CHIPS["M1"], 64)))


def test_unknown_models_and_chips():
    done = CliRunner().invoke(main, ["roofline", "nowhere"])
    assert done.exit_code == 1
    assert "config.json" in done.stderr
    assert CliRunner().invoke(main, ["roofline", "demo", "--chip", "H100"]).exit_code == 2


def test_every_chip_says_who_published_its_numbers():
    assert all(chip.source and chip.family for chip in CHIPS.values())
