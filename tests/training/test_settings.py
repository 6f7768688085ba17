"""Settings of a run: recipes, files, arguments, and the example file."""

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from metalens.training import RECIPES, TrainingConfig, recipe
from metalens.training.settings import DEFAULT_RECIPE, example_file, read_settings, resolve

EXAMPLE = Path(__file__).parents[2] / "examples" / "train.toml"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_completed_by_the_defaults_of_a_run(name):
    found, config = resolve(name, None, {})
    assert found == name
    of_recipe = {key: value for key, value in RECIPES[name].items() if key != "max_seq_len"}
    assert {key: getattr(config, key) for key in of_recipe} == of_recipe
    assert not config.repeat
    assert config.max_seq_len <= RECIPES[name].get("max_seq_len", 512)
    assert resolve(name, None, {}, context=128)[1].max_seq_len == 128


def test_the_default_recipe_exists():
    assert resolve(None, None, {})[0] == DEFAULT_RECIPE


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", '{"recipe": "adam", "num_steps": 7, "learning_rate": 1, "layers": [0, 2], "seed": null}'),
        (".toml", 'recipe = "adam"\nnum_steps = 7\nlearning_rate = 1.0\nlayers = [0, 2]\n'),
    ],
)
def test_files_change_the_recipe_and_arguments_change_files(tmp_path, suffix, content):
    file = tmp_path / f"settings{suffix}"
    file.write_text(content)
    name, config = resolve(None, file, {"num_steps": 9, "seed": None})
    assert name == "adam"
    assert (config.num_steps, config.learning_rate, config.layers, config.seed) == (9, 1, (0, 2), None)
    assert config.optimizer == "adam"
    assert resolve("paper", file, {})[1].optimizer == "sgd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": 3}', "unknown setting steps. Known settings: recipe, tokens, minutes, bias_only"),
        ('{"num_steps": "many"}', "num_steps can't be 'many'; it takes a whole number."),
        ('{"num_steps": 2.5}', "num_steps can't be 2.5"),
        ('{"repeat": 1}', "it takes true or false"),
        ('{"optimizer": "lion"}', "it takes 'sgd' or 'adam' or 'muon'"),
        ('{"layers": [0, "1"]}', "it takes a list of whole numbers or null"),
        ('{"rank": true}', "rank can't be True"),
        ("[1]", "must hold one object"),
        ("{", "can't be read as JSON"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, content, message):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json") as error:
        read_settings(file)
    assert message in str(error.value)


def test_a_variant_needs_no_word_about_the_recipes_warm_start(monkeypatch):
    monkeypatch.setitem(RECIPES, "warm", {"warm_start_tokens": 512})
    assert resolve("warm", None, {})[1].warm_start_tokens == 512
    assert resolve("warm", None, {"rank": 4})[1].warm_start_tokens == 0
    with pytest.raises(ValueError, match="warm start gives full matrices"):
        resolve("warm", None, {"rank": 4, "warm_start_tokens": 100})


def test_the_closed_form_alone_needs_full_matrices():
    assert resolve("ridge", None, {})[1].num_steps == 0
    assert resolve("ridge", None, {})[1].warm_start_tokens == 2**16
    assert resolve("ridge", None, {"rank": 4, "num_steps": 3})[1].warm_start_tokens == 0
    for variant in ({"rank": 4}, {"bias_only": True}):
        with pytest.raises(ValueError, match="The closed form gives full matrices"):
            resolve("ridge", None, variant)


def test_a_dict_and_a_complete_configuration():
    assert resolve(None, {"recipe": "adam", "num_steps": 3}, {"num_steps": 4}) == resolve("adam", None, {"num_steps": 4})
    config = recipe("muon", num_steps=7, max_seq_len=32, repeat=True)
    assert resolve(None, config, {}) == (None, config)
    assert resolve("muon", config, {}, context=16) == ("muon", config)
    assert resolve(None, config, {"num_steps": 8})[1] == recipe("muon", num_steps=8, max_seq_len=32, repeat=True)


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="Unknown setting steps. Known settings: bias_only"):
        resolve(None, None, {"steps": 3})


def test_the_example_file_is_up_to_date():
    """`python -c "from metalens.training.settings import example_file; print(example_file(), end='')" > examples/train.toml` renews it."""
    assert EXAMPLE.read_text(encoding="utf-8") == example_file()


def test_the_example_file_changes_nothing():
    assert resolve(None, EXAMPLE, {}) == resolve(None, None, {})
    assert resolve(None, EXAMPLE, {}, context=100) == resolve(None, None, {}, context=100)


def test_every_setting_is_in_the_example_file_with_its_help():
    text = EXAMPLE.read_text(encoding="utf-8")
    words = " ".join(line.removeprefix("# ") for line in text.splitlines())
    names = {"recipe", *TrainingConfig.__dataclass_fields__}
    settings = [line.removeprefix("# ") for line in text.splitlines() if line.removeprefix("# ").split(" = ")[0] in names]
    uncommented = tomllib.loads("\n".join(settings))
    assert list(uncommented) == ["recipe", *(field.name for field in fields(TrainingConfig))]
    for field in fields(TrainingConfig):
        assert field.metadata["help"] in words
    TrainingConfig.from_dict({name: value for name, value in uncommented.items() if name not in ("recipe", "rank", "bias_only")})
