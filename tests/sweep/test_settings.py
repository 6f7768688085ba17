"""The settings of a sweep: what a file means, and errors that name the key."""

from pathlib import Path

import pytest

from metalens.sweep import read_sweep
from metalens.sweep.settings import Sweep, SweepEvaluation, SweepModel, SweepText
from metalens.utils.errors import InvalidValueError

EXAMPLE = Path(__file__).parents[2] / "examples" / "sweep.toml"


def refusal(file):
    with pytest.raises(InvalidValueError) as caught:
        read_sweep(file)
    return str(caught.value)


def test_a_file_is_read(write, inputs):
    sweep = read_sweep(write(more='seeds = [0, 3]\njobs = 2\ntitle = "T"'))
    assert sweep.models == (SweepModel("a", str(inputs / "a")), SweepModel("b", str(inputs / "b")))
    assert [(recipe.name, dict(recipe.settings)) for recipe in sweep.recipes] == [
        ("one", {"recipe": "mlxterp", "num_steps": 3, "max_seq_len": 16}),
        ("closed form", {"recipe": "ridge", "warm_start_tokens": 256, "max_seq_len": 16}),
    ]
    assert sweep.texts == (SweepText("words", (str(inputs / "train.txt"),), (str(inputs / "held.txt"),)),)
    assert (sweep.seeds, sweep.jobs, sweep.title, sweep.evaluation) == ((0, 3), 2, "T", SweepEvaluation(max_seq_len=16))
    assert sweep.out.name == "sweep-results"


def test_paths_are_relative_to_the_file(write, inputs, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("w1 w2")
    file = tmp_path / "s.toml"
    file.write_text(write().read_text().replace(str(inputs / "train.txt"), "words.txt"))
    monkeypatch.chdir("/")
    assert read_sweep(file).texts[0].train == (str(tmp_path / "words.txt"),)
    file.write_text(file.read_text().replace("words.txt", "missing.txt"))
    assert "there is no file or folder" in refusal(file)


def test_a_pattern_stands_for_checkpoints_in_the_order_of_their_numbers(write, tmp_path):
    for step in (9, 10, 100):
        (tmp_path / "run" / f"step-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"step-{step}" / "config.json").write_text("{}")
    (tmp_path / "run" / "step-200").mkdir()  # without a configuration it is no model
    models = '[[models]]\nname = "run"\nmodel = "run/step-*"\n'
    sweep = read_sweep(write(models="", more=models))
    assert [model.name for model in sweep.models] == ["run step-9", "run step-10", "run step-100"]
    assert sweep.models[0].model == str(tmp_path / "run" / "step-9")
    assert "no folder with a config.json" in refusal(write(models="", more=models.replace("step-", "epoch-")))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"more": "job = 2"}, "unknown key job. Known keys: models"),
        ({"evaluation": "max_token = 5"}, "evaluation: unknown key max_token. Known keys: max_tokens"),
        ({"recipes": '[[recipes]]\nname = "r"\nsteps = 5'}, "recipes[0]: unknown setting steps. Known settings: recipe"),
        ({"recipes": '[[recipes]]\nname = "r"\nrecipe = "best"'}, "Unknown recipe 'best'"),
        ({"recipes": '[[recipes]]\nname = "r"\nseed = 1'}, "recipes[0]: a sweep does not take seed here"),
        ({"recipes": '[[recipes]]\nname = "r"\nminutes = 1'}, "recipes[0]: a sweep does not take minutes here"),
        ({"recipes": '[[recipes]]\nrecipe = "fast"'}, "recipes[0]: name is missing"),
        ({"recipes": '[[recipes]]\nname = "r"\nmomentum = 1.5'}, "momentum"),
        ({"more": "seeds = [0, 0]"}, "seeds must be different"),
        ({"more": "seeds = []"}, "seeds can't be []"),
        ({"more": "jobs = 0"}, "jobs must be at least 1"),
        ({"more": "jobs = true"}, "jobs can't be True; it takes a whole number"),
        ({"evaluation": "max_tokens = 1"}, "max_tokens must be at least 2"),
        ({"models": "aa"}, "models have the name a more than once"),
        ({"models": ""}, "models is missing"),
        ({"more": "recipes = 3", "models": "", "recipes": "models = 3"}, "models must be one or more tables"),
        ({"more": "a = [", "models": ""}, "can't be read as TOML"),
    ],
)
def test_what_is_wrong_is_named(write, change, named):
    assert named in refusal(write(**change))


def test_the_example_is_whole_and_has_every_key():
    sweep = read_sweep(EXAMPLE)
    assert [model.name for model in sweep.models] == ["demo", "small"]
    text = EXAMPLE.read_text()
    for cls in (Sweep, SweepModel, SweepText, SweepEvaluation):
        for name in cls.__dataclass_fields__:
            assert f"{name} = " in text or f"[[{name}]]" in text or f"[{name}]" in text, name
