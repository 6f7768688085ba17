"""The plan of a run: the command, the function, and the time."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from click.testing import CliRunner

import metalens
from metalens import TunedLens
from metalens.cli import main
from metalens.display.tables import plan_remarks
from metalens.estimate.memory import plan
from metalens.models.bundled import MODEL
from metalens.models.facts import facts_of
from metalens.training import TrainingConfig, recipe
from metalens.training.data import Corpus
from metalens.training.speed import seconds_of
from metalens.utils.errors import InvalidValueError
from support.machines import machine


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


def test_the_plan_of_a_run_that_starts_from_a_lens(tmp_path, run):
    TunedLens(8, 256).save(tmp_path / "lens")
    some = plan("demo", start_from=tmp_path / "lens", layers=(0, 1), num_steps=2)
    assert some.memory.start_lens == 6 * 4 * (256 * 256 + 256)
    assert some.config.warm_start_tokens == some.memory.warm_start == 0
    assert plan("demo", start_from=TunedLens.load(tmp_path / "lens"), layers=(0, 1), num_steps=2).total == some.total
    assert plan("demo", layers=(0, 1), num_steps=2).memory.start_lens == 0
    tight = plan("demo", start_from=tmp_path / "lens", layers=(0, 1), num_steps=2, memory=10**8)
    assert tight.advice
    assert not any("--rank" in change.option or "--bias-only" in change.option for change in tight.advice)
    found = run("plan", "demo", "--from", tmp_path / "lens", "--layers", "0,1", "--json")
    assert json.loads(found.stdout)["memory"]["start_lens"] == some.memory.start_lens
    assert "lens to start from" in run("plan", "demo", "--from", tmp_path / "lens", "--layers", "0,1").stdout
    TunedLens(4, 256).save(tmp_path / "other")
    with pytest.raises(ValueError, match="This lens has 4 layers"):
        plan("demo", start_from=tmp_path / "other")


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
