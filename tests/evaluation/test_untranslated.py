"""A lens of some layers is not shown as if it had all."""

import io
import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from rich.console import Console

from metalens import InterpretableModel, TunedLens, evaluate
from metalens.cli import main
from metalens.display.tables import evaluation_table, reading_table


@pytest.fixture(scope="module")
def model(make_llama):
    return InterpretableModel(make_llama(layers=4))


@pytest.fixture(scope="module")
def lens():
    found = TunedLens(4, 64, layers=(1, 3))
    found.translators[1].bias = mx.ones(64)
    return found


@pytest.fixture(scope="module")
def evaluation(model, lens):
    return evaluate(model, list(range(100)), lens, layer_transfer=True, logit_stats=True, bytes_per_token=4.0)


def printed(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_an_evaluation_leaves_them_out(evaluation):
    assert (evaluation.untranslated, evaluation.translated, len(evaluation.tuned)) == ((0, 2), [1, 3], 4)
    found = evaluation.to_dict()
    assert ["tuned" in entry for entry in found["layers"]] == [False, True, False, True]
    assert "bias" in found["layers"][1]["tuned"]
    upstream = evaluation.to_upstream()
    assert list(upstream["tuned"]["kl"]) == list(upstream["tuned"]["layer_transfer"]["kl"]) == ["layer_2", "layer_4"]
    assert len(upstream["logit"]["kl"]) == 4


def test_its_tables_too(evaluation):
    lines = repr(evaluation).splitlines()
    assert [line.split()[3:] == ["-", "-"] for line in lines[2:6]] == [True, False, True, False]
    mean = (evaluation.tuned[1].kl + evaluation.tuned[3].kl) / 2
    assert f"{mean:.3f}" in lines[6]
    assert f"{(evaluation.logit[1].kl + evaluation.logit[3].kl) / 2:.3f}" in lines[6]
    assert "over the 2 layers that the lens translates" in lines[7]
    table = printed(evaluation_table(evaluation))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line.startswith("│")]
    assert [row[-1] == "-" for row in rows[:4]] == [True, False, True, False]
    assert f"{mean:.3f}" in rows[4]
    assert "the lens does not translate this layer" in table


def test_a_whole_lens_is_shown_whole(model):
    found = evaluate(model, list(range(50)), TunedLens(4, 64), bytes_per_token=4.0)
    assert found.untranslated == ()
    assert "-:" not in printed(evaluation_table(found))
    assert all("tuned" in entry for entry in found.to_dict()["layers"])
    assert evaluate(model, list(range(50)), lambda h, layer: h, bytes_per_token=4.0).untranslated == ()


def test_a_reading_marks_them(model, lens):
    reading = model.read([1, 2, 3], lens)
    assert [entry["translated"] for entry in reading.to_dict()["layers"]] == [False, True, False, True]
    table = printed(reading_table(reading, "title"))
    assert "layer 2*" in table
    assert "layer 1 " in table
    assert "*: no translator of this layer" in " ".join(table.split())
    axes = reading.plot(title="title").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0*", "layer 1", "layer 2*", "layer 3", "model"]
    assert "no translator" in axes.get_title().replace("\n", " ")
    only = model.read([1, 2, 3], lens, layers=[1])
    assert "*" not in printed(reading_table(only, "title"))
    assert "*" not in printed(reading_table(model.read([1, 2, 3]), "title"))


def test_the_command_says_them(tmp_path):
    TunedLens(8, 256, layers=(0, 7)).save(tmp_path / "lens")
    result = CliRunner().invoke(main, ["lens", "demo", "Hello", "--lens", str(tmp_path / "lens"), "--layers", "0-2", "--json"])
    assert json.loads(result.stdout)["untranslated"] == [1, 2]
