"""Two tiny models of one width, texts of their words, and settings that combine them."""

import random
from functools import partial
from pathlib import Path

import pytest

from support.saved_models import save_zoo_model

RECIPES = """
[[recipes]]
name = "one"
recipe = "mlxterp"
num_steps = 3
max_seq_len = 16

[[recipes]]
name = "closed form"
recipe = "ridge"
warm_start_tokens = 256
max_seq_len = 16
"""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the models a and b, and the texts train.txt and held.txt."""
    folder = tmp_path_factory.mktemp("sweep-inputs")
    for seed, name in enumerate("ab"):
        save_zoo_model(folder / name, "llama", seed=seed)
    words = random.Random(0)
    for name, count in (("train.txt", 1500), ("held.txt", 60)):
        (folder / name).write_text(" ".join(f"w{words.randrange(95)}" for _ in range(count)))
    return folder


def settings_in(folder, inputs, recipes=RECIPES, models="ab", more="", evaluation="max_seq_len = 16", name="sweep.toml"):
    """Write the settings of a sweep into a folder, and return their file."""
    lines = [more, *(f'[[models]]\nname = "{each}"\nmodel = "{inputs / each}"' for each in models), recipes]
    lines += ["[[texts]]", 'name = "words"', f'train = ["{inputs / "train.txt"}"]', f'evaluate = ["{inputs / "held.txt"}"]']
    file = Path(folder) / name
    file.write_text("\n".join([*lines, "[evaluation]", evaluation]) + "\n")
    return file


@pytest.fixture
def write(inputs, tmp_path):
    """Return a function that writes the settings of a sweep into the test's folder."""
    return partial(settings_in, tmp_path, inputs)


@pytest.fixture(scope="module")
def write_once(inputs, tmp_path_factory):
    """Return a function that writes the settings of a sweep into a folder of the module."""
    return partial(settings_in, tmp_path_factory.mktemp("sweep"), inputs)
