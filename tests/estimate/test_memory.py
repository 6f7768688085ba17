"""The plan of a run: what it says is held against what runs allocate, and against counts by hand."""

import gc
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from metalens import InterpretableModel, accelerate
from metalens.cli import main
from metalens.estimate.memory import memory_of, plan
from metalens.estimate.roofline import MODELS, Dimensions
from metalens.models.bundled import MODEL
from metalens.models.capture import ResidualCapture
from metalens.models.facts import ModelFacts, facts_of
from metalens.training import TrainingConfig, recipe, train_loop
from metalens.training.batching import steps_together

LAYERS, WIDTH, VOCAB = 4, 256, 500
SHORT = {"num_steps": 2, "max_seq_len": 64, "tokens_per_step": 1024, "learning_rate": 1e-3}


def nbytes(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.fixture
def small(make_llama, monkeypatch):
    """A function: a model of a dtype, and what the plan knows of it."""
    capture = ResidualCapture.capture

    def collected(*args, **kwargs):  # what a forward pass leaves behind goes when Python's collector runs
        gc.collect()
        return capture(*args, **kwargs)

    monkeypatch.setattr(ResidualCapture, "capture", collected)

    def make(dtype):
        model = InterpretableModel(make_llama(layers=LAYERS, hidden=WIDTH, vocab=VOCAB, dtype=dtype))
        accelerate(model.model)
        body = LAYERS * (WIDTH * (2 * WIDTH + 2 * WIDTH // 2) + 3 * WIDTH * 2 * WIDTH)
        dimensions = Dimensions(LAYERS, WIDTH, VOCAB, 4, 32, body)
        return model, ModelFacts(dimensions, nbytes(model.model), True, 2 * WIDTH, dtype.size, None)

    return make


CASES = {
    "sgd": ({}, mx.float32),
    "adam": ({"optimizer": "adam"}, mx.float32),
    "muon": ({"optimizer": "muon"}, mx.float32),
    "muon in bfloat16": ({"optimizer": "muon", "dtype": "bfloat16"}, mx.float16),
    "sgd in bfloat16": ({"dtype": "bfloat16"}, mx.float32),
    "adam in bfloat16": ({"optimizer": "adam", "dtype": "bfloat16"}, mx.float32),
    "two layers at once": ({"optimizer": "adam", "layers_at_once": 2}, mx.float32),
    "some layers": ({"layers": (1, 2)}, mx.float16),
    "low rank": ({"rank": 8, "optimizer": "muon"}, mx.float16),
    "biases": ({"bias_only": True}, mx.float32),
    "warm start": ({"warm_start_tokens": 512, "optimizer": "muon"}, mx.float32),
    "short steps": ({"tokens_per_step": 64, "num_steps": 8}, mx.float32),
    "short steps, muon": ({"tokens_per_step": 128, "num_steps": 8, "optimizer": "muon"}, mx.float16),
    "one long sequence": ({"max_seq_len": 1024}, mx.float16),
}


@pytest.mark.parametrize(("settings", "dtype"), CASES.values(), ids=CASES)
def test_memory_is_what_a_run_allocates(small, settings, dtype):
    model, facts = small(dtype)
    config = TrainingConfig(**{**SHORT, **settings})
    ids, unembed = mx.array(np.random.default_rng(0).integers(0, VOCAB, 6000)), model.unembed
    gc.collect()
    mx.clear_cache()
    before, kept = mx.get_active_memory(), []
    mx.reset_peak_memory()

    def look(_):
        gc.collect()
        kept.append(mx.get_active_memory() - before)

    train_loop(model.source, unembed, ids, config, callbacks=[look])
    peak = mx.get_peak_memory() - before
    memory = memory_of(facts, config)
    layer = 4 * (WIDTH if config.bias_only else WIDTH * (2 * config.rank + 1) if config.rank else WIDTH * (WIDTH + 1))
    stays = sum(memory[name] for name in ("translators in training", "optimizer state", "gradients")) - layer
    if steps_together(config) > 1:  # the streams of the steps to come
        stays += 512 * LAYERS * WIDTH * dtype.size
    if not config.bias_only:  # whose few bytes drown in the sequences at hand
        assert kept[-1] == pytest.approx(stays, rel=0.03, abs=60_000)
    counted = sum(memory.values()) - memory["program"] - memory["model"] - memory["logits"]  # the native kernels' blocks are not MLX's
    assert 0.6 * counted < peak < 1.05 * counted


def test_the_model_is_read_from_headers():
    facts = facts_of(str(MODEL))
    model = InterpretableModel(str(MODEL))
    assert facts.exact
    assert facts.weights == nbytes(model.model)
    assert (facts.dimensions.layers, facts.dimensions.depth, facts.dimensions.vocab) == (8, 256, 6000)
    assert facts.dimensions.body == 8 * 256 * (2 * 256 + 2 * 128 + 3 * 704)
    assert (facts.context, facts.intermediate) == (256, 704)


def test_without_weights_the_model_is_estimated(tmp_path):
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    known, facts = facts_of(str(MODEL)), facts_of(str(tmp_path))
    assert not facts.exact
    assert facts.dimensions == known.dimensions
    assert facts.weights == pytest.approx(known.weights, rel=0.25)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 123}}))
    assert facts_of(str(tmp_path)).weights == 123


def test_of_experts_the_active_ones_count(tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "quantization": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {"model.embed_tokens.weight": mx.zeros((60, 4)), "model.layers.0.mlp.up.weight": mx.zeros((8, 3, 4))}
    )
    facts = facts_of(str(tmp_path))
    assert facts.dimensions.body == 2 * 3 * 4
    assert facts.intermediate == 2 * 96


def test_a_damaged_header_is_named(tmp_path):
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00hello")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        facts_of(str(tmp_path))


def test_work_by_hand():
    d = Dimensions(4, 100, 1000, 4, 0, 10**6)
    facts = ModelFacts(d, 0, True, 200, 2, None)
    config = TrainingConfig(num_steps=10, max_seq_len=10, tokens_per_step=50, optimizer="muon", layers=(0, 1, 2), layers_at_once=2)
    flops = plan(facts, config).flops_per_token
    assert flops["the model's forward pass"] == 2 * 2e6
    assert flops["head, for the model"] == 2 * 4 * 1000 * 100
    assert flops["head, for the lens"] == 3 * 4 * 1000 * 100
    assert flops["translators"] == 3 * 6 * 100**2
    assert flops["optimizer"] == pytest.approx(3 * (3 * 6 * 100**3 + 6 * 10100) / 50)
    assert plan(facts, config).flops == pytest.approx(500 * sum(flops.values()))
    warm = plan(facts, replace(config, warm_start_tokens=500)).flops_per_token["warm start"]
    assert warm == pytest.approx(2 * 2e6 + 3 * 2 * 101 * 201)


def test_advice_keeps_its_word():
    facts = facts_of("Llama-3.1-8B-4bit")
    config = recipe("paper", max_seq_len=2048)
    found = plan(facts, config, available=11 * 10**9)
    assert not found.fits
    advice = {entry["option"]: entry for entry in found.advice}
    assert all(entry["bytes"] < found.total for entry in advice.values())
    option = next(o for o in advice if "--layers-at-once" in o and "bfloat16" not in o)
    count = int(option.split()[-1])
    shorter = replace(config, max_seq_len=512)
    assert advice[option]["fits"]
    assert sum(memory_of(facts, replace(shorter, layers_at_once=count)).values()) <= 11e9
    assert sum(memory_of(facts, replace(shorter, layers_at_once=count + 1)).values()) > 11e9
    assert plan(facts, config, available=2**40).advice == []
    assert [entry["option"] for entry in plan(facts, config, available=14 * 10**9).advice] == ["--max-seq-len 512 --tokens-per-step 262144"]
    assert "The model alone takes" in plan(facts, config, available=10**9).remarks[-1]


def test_processes_divide_layers_or_sequences():
    facts, config = facts_of("Llama-3.1-8B-4bit"), recipe("paper", max_seq_len=512)
    alone = memory_of(facts, config)
    layers, data = memory_of(facts, config, 4, "layers"), memory_of(facts, config, 4, "data")
    assert layers["optimizer state"] * 4 == alone["optimizer state"] == data["optimizer state"]
    one, four = plan(facts, config, available=2**50), plan(facts, config, available=2**50, processes=4, share="layers")
    assert four.flops_per_token["the model's forward pass"] == 4 * one.flops_per_token["the model's forward pass"]
    assert four.flops_per_token["head, for the lens"] == one.flops_per_token["head, for the lens"]


def test_settings_that_do_not_fit_the_model():
    facts = facts_of("Llama-3.1-8B-4bit")
    with pytest.raises(ValueError, match="layers must be from 0 to 31"):
        plan(facts, TrainingConfig(layers=(32,)))
    with pytest.raises(ValueError, match="rank must be from 1 to 4096"):
        plan(facts, TrainingConfig(rank=5000))


def test_all_presets_have_a_plan():
    totals = [plan(facts_of(name), recipe("muon", max_seq_len=512)).total for name in MODELS]
    assert totals == sorted(totals)


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args])


def test_the_command_prints_a_table_or_json_alone(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 1000)
    arguments = ("plan", "demo", "--recipe", "paper", "--steps", 2, "--tokens-per-step", 512, "--data", text)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["recipe"] == "paper"
    assert answer["config"]["max_seq_len"] == 256  # the model's context
    assert answer["memory"]["total"] == sum(value for name, value in answer["memory"].items() if name != "total")
    assert answer["text"] == {"tokens": 1024, "passes": 1, "bytes_about": 4096, "tokens_given_about": 1250, "epochs": 1024 / 1250}
    table = run(*arguments)
    assert "optimizer state" in table.stdout
    assert "it fits" in table.stderr
    assert "give more" in run(*arguments, "--steps", 3).stderr


def test_the_command_says_what_would_fit(run):
    result = run("plan", "Llama-3.1-8B-4bit", "--recipe", "muon", "--memory", 11)
    assert result.exit_code == 0, result.stderr
    assert "it does not fit" in result.stderr
    assert "--layers-at-once" in result.stderr
    result = run("plan", "no-such-folder")
    assert result.exit_code == 1
    assert "config.json" in result.stderr
