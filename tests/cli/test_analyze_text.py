"""The text of an analysis is the text that `metalens eval` reads: the same documents, joined and cut in the same way."""

import json

import pytest

from metalens import load
from metalens.analysis import sequences_of
from metalens.cli import main
from metalens.cli.analyze import ANALYSES
from metalens.cli.analyze_text import TextOptions
from metalens.training.data import find_sources, held_out, open_held_out


@pytest.fixture
def files(tmp_path):
    lines = [{"text": f"Click the button number {i}. " * 3} for i in range(6)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "plain.txt").write_text("Click the button in the corner. " * 20, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["lines.jsonl", "plain.txt"])
@pytest.mark.parametrize("most", [None, 40])
def test_it_is_cut_as_eval_cuts_it(files, name, most):
    model = load("demo")
    text = TextOptions((str(files / name),), "text", "test", 16, no_bos=False, max_tokens=most)
    of_eval = open_held_out(find_sources([str(files / name)]), model.tokenizer, max_tokens=most)
    expected = sequences_of(model, of_eval, max_seq_len=16, max_tokens=most)
    assert [ids.tolist() for ids in text.sequences(model)] == [ids.tolist() for ids in expected]
    assert text.corpus(model).join == of_eval.join


def test_a_file_is_not_tokenized_to_its_end(files, monkeypatch):
    """An evaluation does, for bits per byte of the whole text."""
    model, asked, opened = load("demo"), [], held_out.open_corpus
    monkeypatch.setattr(held_out, "open_corpus", lambda *args, **options: asked.append(options["max_tokens"]) or opened(*args, **options))
    text = TextOptions((str(files / "plain.txt"),), "text", "test", 16, no_bos=False, max_tokens=40)
    text.corpus(model)
    text.corpus(model, 50)
    open_held_out(find_sources([str(files / "plain.txt")]), model.tokenizer, max_tokens=40)
    assert asked == [40, 50, None]


def test_every_analysis_has_the_common_options(run):
    analyze = main.commands["analyze"]
    for name in ANALYSES:
        spelled = {spelling for parameter in analyze.commands[name].params for spelling in parameter.opts}
        assert spelled >= {"--lens", "--layers", "--seed", "--json"}, name
        assert (name == "weights") == ("--save" not in spelled) == ("--force" not in spelled)
        assert run("analyze", name, "--help").exit_code == 0
