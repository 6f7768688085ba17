"""A lens of some layers is not shown as if it had all."""

import io
import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from metalens import InterpretableModel, TunedLens, evaluate
from metalens.cli import main
from metalens.display.figures import evaluation_figure, transfer_figure
from metalens.display.tables import evaluation_table, reading_table, transfer_table
from metalens.evaluation import write_results


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


def test_the_files_leave_them_out(model, lens, tmp_path):
    result = evaluate(model, [list(range(40)), list(range(50, 90))], lens, logit_stats=True, embedding=True, bytes_per_token=4.0)
    assert result.untranslated == ("embedding", 0, 2)
    write_results(result, tmp_path)
    line = json.loads((tmp_path / "batches.jsonl").read_text().splitlines()[0])
    assert list(line["tuned"]["kl"]) == list(line["tuned"]["ce"]) == ["layer_2", "layer_4"]
    assert set(line["logit"]["kl"]) == {f"layer_{i}" for i in range(5)}
    found = result.to_dict()
    assert found["embedding"].keys() == {"logit"}
    assert [error is None for error in found["standard_errors"]["tuned"]["kl"]] == [True, False, True, False]
    assert found["standard_errors"].keys() == {"model", "logit", "tuned", "logit embedding"}
    assert list(result.to_upstream()["tuned"]["ce"]) == ["layer_2", "layer_4"]
    with np.load(tmp_path / "logit_stats.npz") as stored:
        assert stored["tuned_layers"].tolist() == [1, 3]
        np.testing.assert_allclose(stored["tuned_marginal_probs"], result.logit_stats["tuned"].marginal_probs[[1, 3]], rtol=1e-6)
        assert "logit_embedding_marginal_probs" in stored.files
        assert "tuned_embedding_marginal_probs" not in stored.files
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed(evaluation_table(result)).splitlines() if line.startswith("│")]
    assert [row[-1] == "-" for row in rows[:5]] == [True, True, False, True, False]
    assert repr(result).splitlines()[2].split()[3:] == ["-", "-"]
    curves = evaluation_figure(result).axes[0].lines
    assert [line.get_xdata().tolist() for line in curves] == [[-1, 0, 1, 2, 3], [1, 3]]


def test_a_lens_of_the_embedding_alone_has_no_mean(model):
    lens = TunedLens(4, 64, layers=(), embedding=True)
    result = evaluate(model, list(range(50)), lens, embedding=True, layer_transfer=True, bytes_per_token=4.0)
    assert (result.translated, result.transfer.layers) == ([], ("embedding",))
    assert "embedding" in printed(evaluation_table(result))
    assert "mean" not in repr(result)


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


def test_its_layer_transfer_shows_the_layers_that_it_translates(evaluation):
    assert evaluation.transfer.layers == (1, 3)
    table = printed(transfer_table(evaluation.transfer, 4))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line.startswith("│")]
    penalty = evaluation.transfer.penalty
    assert rows == [[str((1, 3)[i]), *(f"{penalty[i][j]:z.2f}" for j in (0, 1))] for i in (0, 1)]
    assert "The 2 layers that the lens translates." in " ".join(table.split())
    figure = transfer_figure(evaluation.transfer, "title", 4)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), penalty)
    figure.canvas.draw()
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        shown = [label.get_text() for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True) if low <= place <= high]
        assert shown == ["1", "3"]
    assert "2 layers that the lens translates" in axes.get_title().replace("\n", " ")
    whole = printed(transfer_table(evaluation.transfer))  # how many blocks there are is not known
    assert "that the lens translates" not in whole
    assert transfer_figure(evaluation.transfer, "title").axes[0].get_title() == "title"


def test_a_data_frame_of_a_reading_tells_them(model, lens, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=SimpleNamespace(from_records=list)))
    records = model.read([1, 2, 3], lens, top_k=2).to_pandas()
    assert {(record["layer"], record["translated"]) for record in records} == {(0, False), (1, True), (2, False), (3, True)}
    assert all(record["translated"] for record in model.read([1, 2, 3]).to_pandas())
