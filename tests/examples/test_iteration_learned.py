"""examples/iteration_learned.py runs: a byte model is trained, and its predictions are compared at every power of two."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "iteration_learned.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("iteration_learned", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"LAYERS": 2, "WIDTH": 32, "LENGTH": 16, "BATCH": 2, "TEXTS": 3, "LENS_TOKENS": 256}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_steps_are_powers_of_two_and_the_last(example):
    ids = example.np.arange(500, dtype=example.np.int32) % 256
    assert list(example.training_steps(example.byte_model(), ids, 6)) == [0, 1, 2, 4, 6]


def test_it_compares_both_lenses(example, capsys):
    example.main(3)
    first, *lenses = capsys.readouterr().out.splitlines()
    counts = first.split(": ", 1)[1]
    assert sum(int(part.split(": ")[1]) for part in counts.strip("{}").split(", ")) == 3 * 16
    assert [line.split(":")[0] for line in lenses] == ["logit lens", "tuned lens"]
