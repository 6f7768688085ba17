"""Memory and work of a run: what the plan says is held against what runs allocate, and against counts by hand."""

import gc
import importlib.machinery
import importlib.util
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens import InterpretableModel, TunedLens, accelerate
from metalens.display.tables import plan_remarks
from metalens.estimate.memory import TORCH, memory_of, plan
from metalens.estimate.start import StartSizes
from metalens.models.bundled import MODEL
from metalens.models.capture import ResidualCapture
from metalens.models.facts import KNOWN_MODELS, ModelDimensions, ModelFacts, facts_of
from metalens.ops import use_backend
from metalens.training import TrainingConfig, recipe, train_loop
from metalens.training.batching import steps_together
from metalens.training.start import StartLens

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
        dimensions = ModelDimensions(LAYERS, WIDTH, VOCAB, 4, 32, body)
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
    "shuffled tokens": ({"tokens_per_step": 128, "num_steps": 24, "shuffle_tokens": 1536}, mx.float16),
    "shuffled tokens, muon": ({"tokens_per_step": 64, "num_steps": 16, "shuffle_tokens": 1024, "optimizer": "muon"}, mx.float32),
    "fewer steps than are shuffled": ({"tokens_per_step": 128, "num_steps": 12, "shuffle_tokens": 4096}, mx.float16),
    "one long sequence": ({"max_seq_len": 1024}, mx.float16),
}


def allocated(model, config, start=lambda: None):
    """Train, and return the bytes that the run has after its last step, and at most, beside those before it. `start` makes the lens to start from."""
    ids = mx.array(np.random.default_rng(0).integers(0, VOCAB, 6000))
    gc.collect()
    mx.clear_cache()
    before, kept = mx.get_active_memory(), []
    mx.reset_peak_memory()

    def look(_):
        gc.collect()
        kept.append(mx.get_active_memory() - before)

    train_loop(model.source, model.unembed, ids, config, start=start(), callbacks=[look])
    return kept[-1], mx.get_peak_memory() - before


@pytest.mark.parametrize(("settings", "dtype"), CASES.values(), ids=CASES)
def test_memory_is_what_a_run_allocates(small, settings, dtype):
    model, facts = small(dtype)
    config = TrainingConfig(**{**SHORT, **settings})
    kept, peak = allocated(model, config)
    memory = memory_of(facts, config)
    layer = 4 * (WIDTH if config.bias_only else WIDTH * (2 * config.rank + 1) if config.rank else WIDTH * (WIDTH + 1))
    stays = memory.translators + memory.optimizer_state + memory.gradients - layer
    if steps_together(config) > 1:  # the hidden states of the steps to come
        together = min(max(512, config.shuffle_tokens), config.num_steps * config.step_tokens)
        taken_out = config.step_tokens if config.shuffle_tokens else 0  # of the step that ends, from among the others
        stays += (together + taken_out) * LAYERS * WIDTH * dtype.size
    if not config.bias_only:  # whose few bytes drown in the sequences at hand
        assert kept == pytest.approx(stays, rel=0.03, abs=60_000)
    counted = memory.total - memory.program - memory.model - memory.logits  # the native kernels' blocks are not MLX's
    assert 0.55 * counted < peak < 1.05 * counted


STARTS = {
    "the same translators": ({}, {}, mx.float32),
    "some layers": ({}, {"layers": (1,)}, mx.float16),
    "in bfloat16": ({}, {"dtype": "bfloat16", "layers": (0, 2)}, mx.float32),
    "one layer in bfloat16": ({}, {"dtype": "bfloat16", "layers": (0,)}, mx.float32),
    "a low rank goes on as full matrices": ({"rank": 8}, {}, mx.float32),
    "biases": ({"bias_only": True}, {"bias_only": True, "layers": (0, 1, 2)}, mx.float32),
}


@pytest.mark.parametrize(("kind", "settings", "dtype"), STARTS.values(), ids=STARTS)
def test_memory_of_a_run_that_starts_from_a_lens(small, settings, dtype, kind):
    model, facts = small(dtype)
    config = TrainingConfig(**{**SHORT, **settings})
    lens = TunedLens(LAYERS, WIDTH, **kind)
    sizes = StartSizes.of(lens, facts.dimensions, config)
    assert sizes.kept + sizes.shared + sizes.others == nbytes(lens)
    del lens
    kept, peak = allocated(model, config, lambda: StartLens(TunedLens(LAYERS, WIDTH, **kind)))
    memory = memory_of(facts, config, start=sizes)
    assert memory.start_lens >= sizes.kept
    layer = 4 * (WIDTH if config.bias_only else WIDTH * (WIDTH + 1))
    stays = memory.translators + memory.optimizer_state + memory.gradients - layer + sizes.kept
    if not config.bias_only:
        assert kept == pytest.approx(stays, rel=0.03, abs=60_000)
    counted = memory.total - memory.program - memory.model - memory.logits
    assert 0.55 * counted < peak < 1.05 * counted


def test_work_by_hand():
    d = ModelDimensions(4, 100, 1000, 4, 0, 10**6)
    facts = ModelFacts(d, 0, True, 200, 2, None)
    config = TrainingConfig(num_steps=10, max_seq_len=10, tokens_per_step=50, optimizer="muon", layers=(0, 1, 2), layers_at_once=2)
    flops = plan(facts, config=config).flops_per_token
    assert flops.forward == 2 * 2e6
    assert flops.model_head == 2 * 4 * 1000 * 100
    assert flops.lens_head == 3 * 4 * 1000 * 100
    assert flops.translators == 3 * 6 * 100**2
    assert flops.optimizer == pytest.approx(3 * (3 * 4 * 100**3 + 6 * 10100) / 50)  # 3 polynomials: a product, and half of two
    assert plan(facts, config=config).flops == pytest.approx(500 * flops.total)
    warm = plan(facts, config=replace(config, warm_start_tokens=500)).flops_per_token.warm_start
    assert warm == pytest.approx(2 * 2e6 + 3 * (3 * 100**2 + 7 * 100))


def test_work_and_memory_of_a_sampled_vocabulary():
    d = ModelDimensions(4, 128, 10_000, 4, 64, 10**6)
    facts = ModelFacts(d, 0, True, 200, 2, None)
    config = TrainingConfig(num_steps=10, max_seq_len=128, tokens_per_step=512, vocabulary=2000)
    sampled, full, as_large = (plan(facts, config=replace(config, vocabulary=v)) for v in (2000, "full", 10_000))
    assert sampled.flops_per_token.lens_head == 4 * 4 * 2000 * 128
    assert sampled.flops_per_token.model_head == (4 * 2000 + 2 * 10_000) * 128
    assert plan(facts, config=replace(config, vocabulary="sampled")).flops_per_token.lens_head == 4 * 4 * 5337 * 128  # 5461 to 2660
    assert as_large.flops_per_token == full.flops_per_token
    assert as_large.memory == full.memory
    with use_backend("reference"):  # which holds logits
        sampled, full = (plan(facts, config=replace(config, vocabulary=v)).memory for v in (2000, "full"))
    assert sampled.logits <= full.logits + 2000 * (128 / 2 + 8)


def test_advice_keeps_its_word():
    facts = facts_of("Llama-3.1-8B-4bit")
    config = recipe("paper", max_seq_len=2048)
    found = plan(facts, config=config, memory=11 * 10**9)
    assert not found.fits
    advice = {entry.option: entry for entry in found.advice}
    assert all(entry.bytes < found.total for entry in advice.values())
    option = next(o for o in advice if "--layers-at-once" in o and "bfloat16" not in o)
    count = int(option.split()[-1])
    shorter = replace(config, max_seq_len=512)
    assert advice[option].fits
    assert memory_of(facts, replace(shorter, layers_at_once=count)).total <= 11e9
    assert memory_of(facts, replace(shorter, layers_at_once=count + 1)).total > 11e9
    assert plan(facts, config=config, memory=2**40).advice == ()
    assert [entry.option for entry in plan(facts, config=config, memory=16_150_000_000).advice] == ["--max-seq-len 512 --tokens-per-step 262144"]
    assert "The model alone takes" in plan_remarks(plan(facts, config=config, memory=10**9))[-1]


def test_processes_divide_layers_or_sequences():
    facts, config = facts_of("Llama-3.1-8B-4bit"), recipe("paper", max_seq_len=512, embedding=False)
    alone = memory_of(facts, config)
    layers, data = memory_of(facts, config, 4, "layers"), memory_of(facts, config, 4, "data")
    assert layers.optimizer_state * 4 == alone.optimizer_state == data.optimizer_state
    one, four = plan(facts, config=config, memory=2**50), plan(facts, config=config, memory=2**50, processes=4, parallel="layers")
    assert four.flops_per_token.forward == 4 * one.flops_per_token.forward
    assert four.flops_per_token.lens_head == one.flops_per_token.lens_head


def test_settings_that_do_not_fit_the_model():
    facts = facts_of("Llama-3.1-8B-4bit")
    with pytest.raises(ValueError, match="layers must be from 0 to 31"):
        plan(facts, config=TrainingConfig(layers=(32,)))
    with pytest.raises(ValueError, match="rank must be from 1 to 4096"):
        plan(facts, config=TrainingConfig(rank=5000))


def test_all_presets_have_a_plan():
    totals = [plan(facts_of(name), config=recipe("muon", max_seq_len=512)).total for name in KNOWN_MODELS]
    assert totals == sorted(totals)


def test_a_large_tokenizer_takes_memory():
    facts = facts_of(str(MODEL))
    config = TrainingConfig()
    large = memory_of(replace(facts, tokenizer_bytes=33_000_000), config).program - memory_of(replace(facts, tokenizer_bytes=0), config).program
    assert large == pytest.approx(385e6, rel=0.1)  # measured with Gemma 3's


def test_the_head_may_have_another_format_than_the_blocks(tmp_path):
    quantization = {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 64, "bits": 8}}
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"quantization": quantization}))
    found = facts_of(str(tmp_path))
    assert (found.dimensions.bits, found.dimensions.group_size, found.block_bits, found.block_group_size) == (8, 64, 4, 32)


def test_pytorch_beside_metalens_takes_memory(monkeypatch):
    """transformers imports it with a tokenizer."""
    find, programs = importlib.util.find_spec, []
    for there in (None, importlib.machinery.ModuleSpec("torch", None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more, there=there: there if name == "torch" else find(name, *more))
        programs.append(memory_of(facts_of(str(MODEL)), TrainingConfig()).program)
    assert programs[1] - programs[0] == TORCH > 200_000_000
