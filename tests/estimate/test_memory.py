"""The plan of a run: what it says is held against what runs allocate, and against counts by hand."""

import gc
import importlib.machinery
import importlib.util
import json
from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

import metalens
from metalens import InterpretableModel, accelerate
from metalens.cli import main
from metalens.display.tables import plan_remarks
from metalens.estimate.memory import TORCH, memory_of, plan
from metalens.models.bundled import MODEL
from metalens.models.capture import ResidualCapture
from metalens.models.facts import KNOWN_MODELS, ModelDimensions, ModelFacts, facts_of
from metalens.ops import use_backend
from metalens.training import TrainingConfig, recipe, train_loop
from metalens.training.batching import steps_together
from metalens.training.data import Corpus
from metalens.training.speed import seconds_of
from metalens.utils.errors import InvalidValueError
from support.machines import machine

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
    stays = memory.translators + memory.optimizer_state + memory.gradients - layer
    if steps_together(config) > 1:  # the hidden states of the steps to come
        stays += 512 * LAYERS * WIDTH * dtype.size
    if not config.bias_only:  # whose few bytes drown in the sequences at hand
        assert kept[-1] == pytest.approx(stays, rel=0.03, abs=60_000)
    counted = memory.total - memory.program - memory.model - memory.logits  # the native kernels' blocks are not MLX's
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
    assert plan(facts, config=replace(config, vocabulary="sampled")).flops_per_token.lens_head == 4 * 4 * 2048 * 128
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
    assert answer["text"] == {
        "tokens": 1088,
        "held_back": 64,
        "share_known": True,
        "passes": 1,
        "bytes_about": 4352,
        "tokens_given_about": 1250,
        "epochs": 1088 / 1250,
    }
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


# ------------------------------------------------------------------ from Python


def test_a_plan_needs_no_more_than_a_name():
    found = metalens.plan("demo")
    assert found.config == recipe("fast", max_seq_len=256, seed=0, repeat=False)  # the model's context
    assert found.memory.total == found.total == sum(asdict(found.memory).values())
    assert found == plan(facts_of(str(MODEL)), "fast", max_seq_len=256)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict() | {"advice": []}


def test_settings_replace_those_of_a_recipe_a_file_or_a_configuration(tmp_path):
    by_name = plan("demo", "paper", num_steps=3, rank=4)
    assert (by_name.recipe, by_name.config.num_steps, by_name.config.rank, by_name.config.optimizer) == ("paper", 3, 4, "sgd")
    (tmp_path / "settings.json").write_text('{"recipe": "adam", "num_steps": 7, "rank": 2}')
    by_file = plan("demo", config=tmp_path / "settings.json", rank=3)
    assert (by_file.recipe, by_file.config.num_steps, by_file.config.rank) == ("adam", 7, 3)
    config = TrainingConfig(num_steps=5, optimizer="adam")
    assert (plan("demo", config=config).recipe, plan("demo", config=config).config) == (None, config)
    assert plan("demo", config=config, num_steps=6).config == replace(config, num_steps=6)
    for base in ({"recipe": "paper"}, {"config": config}):
        with pytest.raises(InvalidValueError, match="nonsense"):
            plan("demo", **base, nonsense=1)


def test_the_given_text_is_measured(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 1000)
    (tmp_path / "b.txt").write_text("word " * 600)
    assert plan("demo", data=tmp_path).text_tokens == 2000
    assert plan("demo", data=[tmp_path / "a.txt"]).text_tokens == 1250
    (tmp_path / "c.jsonl").write_text('{"text": "word"}\n')
    assert plan("demo", data=tmp_path).text_tokens is None
    assert plan("demo", data=["A text of words.", "And another."]).text_tokens == 28 // 4
    assert plan("demo", data=np.arange(100)).text_tokens == 100
    for nothing in (tmp_path / "nothing.txt", "nothing.txt", ["nothing.txt"]):
        with pytest.raises(InvalidValueError, match="no file or folder"):
            plan("demo", data=nothing)


def test_the_text_of_a_plan_includes_what_the_guard_holds_back(run):
    """A text of just the tokens of the steps is too short for a run with a guard."""
    found = plan("demo", "muon", data=np.arange(2048), num_steps=16, max_seq_len=128, tokens_per_step=128)
    assert (found.config.total_tokens, found.config.held_back_tokens, found.tokens_needed) == (2048, 128, 2176)
    assert found.epochs == 2176 / 2048
    assert any("needs 2176" in line for line in plan_remarks(found))
    table = run("plan", "demo", "--recipe", "muon", "--steps", 16, "--max-seq-len", 128, "--tokens-per-step", 128).stdout
    assert "2,176" in table
    assert "held back for the guard" in table


@pytest.mark.parametrize("wrong", [{"processes": 0}, {"memory": 0}, {"parallel": "both"}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        plan("demo", **wrong)


def test_older_names_of_arguments_and_attributes():
    with pytest.warns(DeprecationWarning, match="The argument available of plan is called memory now"):
        assert plan("demo", available=10**9).available == 10**9
    with pytest.warns(DeprecationWarning, match="share of plan is called parallel"):
        assert plan("demo", processes=2, share="layers") == plan("demo", processes=2, parallel="layers")
    with pytest.warns(DeprecationWarning, match=r"plan\(facts, config\) is plan\(facts, config=config\) now"):
        assert plan("demo", TrainingConfig()).config == TrainingConfig()
    facts = facts_of(str(MODEL))
    with pytest.warns(DeprecationWarning, match=r"ModelFacts\.weights is called weight_bytes now"):
        assert facts.weights == facts.weight_bytes


# ------------------------------------------------------------------ time, and readable units


@pytest.fixture
def slow_machine(monkeypatch):
    monkeypatch.setattr("metalens.estimate.run_time.measured_speed", lambda _: machine(2e-7, 1e9, 1e9))


@pytest.mark.usefixtures("slow_machine")
def test_a_long_run_names_a_budget_of_ten_minutes(run):
    assert plan("demo").duration is None
    found = plan("demo", measure=True)
    assert found.duration.total > 3600
    short = plan("demo", tokens=found.short_budget, measure=True)
    assert 450 < short.duration.total <= 600
    assert short.short_budget is None
    assert plan("demo", minutes=10.0).config == short.config
    assert f"--tokens {found.short_budget} takes about ten minutes" in run("plan", "demo").stderr
    answer = json.loads(run("plan", "demo", "--json").stdout)
    assert answer["seconds"]["total"] == found.duration.total
    assert answer["ten_minute_tokens"] == found.short_budget


@pytest.mark.usefixtures("slow_machine")
def test_the_tokens_between_the_answers_take_time(run, tmp_path):
    """The model reads all tokens: a text of which a quarter counts takes four forward passes for each token of the run."""
    ids = np.arange(400) % 100
    options = {"measure": True, "loss_on": "answers", "num_steps": 2, "max_seq_len": 16}
    quarter, all_ = (plan("demo", "mlxterp", data=Corpus.from_ids(ids, answers=mask), **options) for mask in (ids % 4 == 1, ids >= 0))
    speed = machine(2e-7, 1e9, 1e9)
    assert quarter.text_tokens == 100
    assert quarter.duration == seconds_of(quarter.facts, quarter.config, speed, share=0.25)
    assert quarter.duration.total > all_.duration.total
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    known = ("plan", "demo", "--steps", 2, "--max-seq-len", 16, "--tokens-per-step", 16, "--data", tmp_path / "chat.jsonl")
    assert "the run takes more time than this" in run(*known, "--loss-on", "answers", "--field", "messages").stderr
    assert "the run takes more time than this" not in run(*known).stderr
    fewer = plan("demo", "ridge", data=Corpus.from_ids(ids, answers=ids % 4 == 1), loss_on="answers", minutes=1.0).config.total_tokens
    assert fewer < 0.5 * plan("demo", "ridge", minutes=1.0).config.total_tokens


@pytest.mark.usefixtures("slow_machine")
def test_the_closed_form_alone_has_work_and_memory_of_its_own(run):
    """Its work is that of a run, not of a step's token; nothing is "0 PFLOP" or "0 MB"."""
    found = plan("demo", num_steps=0, warm_start_tokens=4096)
    assert found.flops == found.warm_start_flops == 4096 * found.flops_per_token.warm_start > 0
    assert (found.memory.gradients, found.memory.logits, found.memory.update) == (0, 0, 0)
    table = run("plan", "demo", "--steps", 0, "--warm-start-tokens", 4096).stdout
    assert " 0 " not in table
    assert "FLOP/token" not in table
    assert "size, about" in table
    assert "16 kB" in table


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
