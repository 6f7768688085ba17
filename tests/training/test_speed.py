"""The time of a run: counted work at a measured speed. No test measures a time."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from metalens import InterpretableModel, plan
from metalens.models.bundled import MODEL
from metalens.models.facts import ModelDimensions, ModelFacts, facts_of, facts_of_model
from metalens.ops import head_logits, lens_kl
from metalens.training import TrainingConfig, TrainingInterruptedError, speed_probe, train
from metalens.training.guard import check_every
from metalens.training.settings import resolve
from metalens.training.speed import START, START_PER_TOKENIZER_BYTE, START_PER_WEIGHT_BYTE, Duration, Speed, budget_in, seconds_of
from metalens.training.speed_probe import measured_speed
from metalens.training.work import iteration_flops, update_flops
from metalens.utils.errors import InvalidValueError
from support.machines import machine

FACTS = ModelFacts(ModelDimensions(4, 100, 1000, 4, 0, 10**6), 2 * 10**8, True, 200, 2, None, 6 * 10**6)
GIVEN = machine()
UNLIKE = machine(beside=1e-4, sums=3e7, solution=5e7, iteration=2e7, sampled_kl=5e-6, check=3e-6)


def test_time_by_hand():
    config = TrainingConfig(num_steps=10, max_seq_len=10, tokens_per_step=50, optimizer="muon", warm_start_tokens=300, layers=(0, 1))
    found = seconds_of(FACTS, config, UNLIKE)
    forward = 2e6 / 1e9 + 4 * 1e-4
    token = forward + 1000 * 1e-6 + 2 * (1000 * 2e-6 + 6 * 100**2 / 1e8)
    iterations = iteration_flops(100, config)
    update = iterations / 2e7 + (update_flops(100, config) - iterations) / 1e8
    assert found.start == pytest.approx(0.01 * (START + 6e6 * START_PER_TOKENIZER_BYTE + 2e8 * START_PER_WEIGHT_BYTE))
    assert found.warm_start == pytest.approx(300 * (forward + 2 * (3 * 100**2 + 7 * 100) / 3e7) + 2 * 100**3 / 5e7)
    assert found.steps == pytest.approx(10 * (50 * token + 2 * update))
    assert found.total == found.start + found.warm_start + found.steps
    two = seconds_of(FACTS, config, UNLIKE, passes=2)
    assert two.steps == pytest.approx(found.steps + 500 * (forward + 1000 * 1e-6))
    assert seconds_of(FACTS, config, UNLIKE, processes=2).steps < found.steps


def test_time_with_a_sampled_vocabulary_by_hand():
    """The lens's rows meet 200 of 1,000 ids; the model's own meet all of them once, and those 200 too. The guard's rows meet all."""
    config = TrainingConfig(num_steps=10, max_seq_len=10, tokens_per_step=50, optimizer="muon", layers=(0, 1), vocabulary=200)
    forward = 2e6 / 1e9 + 4 * 1e-4
    token = forward + 1200 * 1e-6 + 2 * (200 * 5e-6 + 6 * 100**2 / 1e8)
    iterations = iteration_flops(100, config)
    steps = 10 * (50 * token + 2 * (iterations / 2e7 + (update_flops(100, config) - iterations) / 1e8))
    assert seconds_of(FACTS, config, UNLIKE).steps == pytest.approx(steps)
    guarded = replace(config, guard_tokens=30)
    checks = 30 * (1 + 10 // check_every(guarded, 30))
    assert seconds_of(FACTS, guarded, UNLIKE).steps == pytest.approx(steps + checks * (forward + 2 * 1000 * 3e-6))
    as_large, full = (seconds_of(FACTS, replace(config, vocabulary=v), UNLIKE) for v in (1000, "full"))
    assert as_large == full


@pytest.mark.parametrize("seconds", [1, 20, 600, 10**5])
def test_a_budget_fits_into_the_time(seconds):
    def settings(tokens):
        return resolve("fast", None, {"tokens": tokens})[1]

    def duration(config):
        return seconds_of(FACTS, config, GIVEN)

    found = budget_in(seconds, settings, duration)
    if found > 128:
        assert duration(settings(found)).total <= seconds < duration(settings(round(1.3 * found))).total


def test_a_budget_in_time_holds_a_sequence_of_the_length_that_is_asked_for():
    """A run with max_seq_len=300 failed: the search began with 128 tokens, which hold no such sequence."""

    def settings(budget):
        return resolve("fast", None, {"tokens": budget, "max_seq_len": 300}, None)[1]

    found = budget_in(60.0, settings, lambda config: Duration(0.0, 0.0, (config.total_tokens + config.held_back_tokens) / 100))
    assert 0.9 * 6000 < found < 6000 + 300  # whole sequences
    assert settings(found).max_seq_len == 300
    with pytest.raises(ValueError, match="momentum"):
        budget_in(60.0, lambda budget: resolve("fast", None, {"tokens": budget, "momentum": 2.0}, None)[1], lambda config: Duration(0.0, 0.0, 1.0))


def test_the_probe_is_made_once_for_each_model(monkeypatch):
    facts, probes = facts_of(str(MODEL)), []
    speed_probe._measured.cache_clear()
    monkeypatch.setattr(speed_probe, "_seconds", lambda compute: probes.append(compute()) or 0.5)
    try:
        first = measured_speed(facts)
        assert measured_speed(facts) is first
        assert len(probes) == len(fields(Speed))
        assert min(vars(first).values()) > 0
    finally:
        speed_probe._measured.cache_clear()


def test_facts_of_a_model_without_a_folder(make_llama):
    model = InterpretableModel(make_llama(layers=3, hidden=64, vocab=131))
    d = facts_of_model(model).dimensions
    body = 3 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 128)
    assert d == ModelDimensions(3, 64, 131, 4, 32, body)
    assert facts_of_model(InterpretableModel(str(MODEL))) == facts_of(str(MODEL))


# ------------------------------------------------------------------ minutes


@pytest.fixture
def known(monkeypatch):
    """A machine of a known speed."""
    for module in ("metalens.training.settle", "metalens.estimate.run_time"):
        monkeypatch.setattr(f"{module}.measured_speed", lambda _: GIVEN)


@pytest.mark.usefixtures("known")
@pytest.mark.filterwarnings("ignore::metalens.training.guard.GuardWarning")
def test_minutes_become_tokens_and_a_resumed_run_keeps_them(tmp_path, monkeypatch):
    model, out = InterpretableModel(str(MODEL)), tmp_path / "lens"
    ids, seen = list(range(100)) * 30, []
    options = {"minutes": 0.35, "recipe": "fast", "out": out, "num_steps": 4, "layers": (0,), "cache_dir": tmp_path}
    with pytest.raises(TrainingInterruptedError):
        train(model, ids, **options, callbacks=[seen.append], stop=lambda: len(seen) == 1)
    record = json.loads((max((tmp_path / "lens.checkpoints").glob("step-*")) / "state.json").read_text())["config"]
    assert 100 < record["warm_start_tokens"] + 4 * record["tokens_per_step"] < 3000
    monkeypatch.setattr("metalens.training.settle.measured_speed", lambda _: machine(2e-7, 1e10, 1e9))
    lens = train(model, ids, **options, resume=True)
    assert {name: lens.provenance["training"][name] for name in ("num_steps", "tokens_per_step")} == {
        name: record[name] for name in ("num_steps", "tokens_per_step")
    }


@pytest.mark.usefixtures("known")
def test_minutes_in_a_file_are_those_of_the_caller(tmp_path):
    model, ids = InterpretableModel(str(MODEL)), list(range(100)) * 30
    (tmp_path / "settings.toml").write_text('recipe = "fast"\nminutes = 0.35\nlayers = [0]\n')
    options = {"recipe": "fast", "minutes": 0.35, "layers": (0,)}
    by_file, by_argument = train(model, ids, config=tmp_path / "settings.toml"), train(model, ids, **options)
    assert by_file.provenance["training"] == by_argument.provenance["training"]
    facts = facts_of_model(model)
    assert plan(facts, config=tmp_path / "settings.toml").config == plan(facts, **options).config


@pytest.mark.usefixtures("known")
def test_minutes_take_no_more_than_the_text():
    lens = train(InterpretableModel(str(MODEL)), list(range(100)) * 5, minutes=1000.0, layers=(0,), bias_only=True, recipe="adam")
    assert 300 < lens.provenance["tokens"] <= 500


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), float("nan")])
def test_what_are_no_minutes(minutes):
    with pytest.raises(InvalidValueError, match="minutes must be a number above 0"):
        train("demo", [1, 2, 3], minutes=minutes)


def test_tokens_and_minutes_exclude_each_other():
    with pytest.raises(InvalidValueError, match="give one of them"):
        train("demo", [1, 2, 3], minutes=1, tokens=100)


def test_a_duration_adds_up():
    assert Duration(1, 2, 3).total == 6


@pytest.mark.parametrize(("hidden_size", "bits"), [(100, 0), (640, 4)])
def test_the_probe_s_logits_are_spread_as_a_model_s_are(monkeypatch, hidden_size, bits):
    """A spread of sqrt(D) left nearly all probabilities subnormal: the probe was half as fast as the training."""
    seen = []

    def recording(rows, target, head):
        seen.append((rows, head))
        return lens_kl(rows, target, head)

    monkeypatch.setattr(speed_probe, "lens_kl", recording)
    monkeypatch.setattr(speed_probe, "SECONDS", 0.0)
    dimensions = ModelDimensions(4, hidden_size, 1000, bits or 32, 32 if bits else 0, 10**6)
    facts = replace(FACTS, dimensions=dimensions, block_bits=bits or 32, block_group_size=32 if bits else 0)
    assert measured_speed(facts).kl > 0
    rows, head = seen[0]
    assert 1.0 < np.std(np.array(head_logits(rows[0], head))) < 4.0
