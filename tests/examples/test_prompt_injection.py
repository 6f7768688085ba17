"""examples/prompt_injection.py: its questions are those of the committed files, and it runs."""

import importlib.util
from pathlib import Path

import pytest

from metalens.analysis import read_questions
from support.saved_models import save_zoo_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("prompt_injection", EXAMPLES / "prompt_injection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_script_writes(example, tmp_path):
    example.write(tmp_path)
    for name in ("reviews.jsonl", "reviews_injected.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()
    assert read_questions(tmp_path / "reviews.jsonl") == example.reviews()


def test_an_injected_question_orders_the_wrong_answer(example):
    for question in example.reviews():
        changed = example.injected(question)
        assert (changed.choices, changed.answer) == (question.choices, question.answer)
        assert f'"{question.choices[1 - question.answer].strip()}"' in changed.context
        assert changed.context.endswith(example.CUE)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_it_runs(example, tmp_path, monkeypatch, capsys):
    few = example.reviews()[:12]
    monkeypatch.setattr(example, "reviews", lambda: few)
    example.main(str(save_zoo_model(tmp_path / "model", "llama")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "logit lens, isolation-forest",
        "logit lens, local-outlier-factor",
        "logit lens, mahalanobis",
        "hidden states of the middle block, relative-mahalanobis",
    ]
