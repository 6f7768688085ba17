"""Tables and pictures of causal analyses show the numbers that they are given."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from metalens.analysis import (
    Alignment,
    CausalBasis,
    Effect,
    Fidelity,
    GradientAlignment,
    Interval,
    LayerEffects,
    LensAlignment,
    ResidualStatistics,
    residual_report,
)
from metalens.display.causal_figures import SMALLEST, alignment_figure, fidelity_figure, layers_figure, residuals_figure
from metalens.display.causal_tables import alignment_table, basis_table, correlation_lines, layers_table, residuals_table
from metalens.evaluation import Transfer

NOTHING = Interval(math.nan, math.nan, math.nan)


def around(value):
    return Interval(value, value - 0.05, value + 0.05)


@pytest.fixture
def bases():
    flags = np.array([True, False])
    return [CausalBasis(layer, np.eye(4)[:2], np.array([0.5 + layer, 0.0]), flags * 3, flags, np.zeros(4), "mean", 9) for layer in (2, 5)]


@pytest.fixture
def fidelity():
    influence = [Effect(around(0.25), around(0.1)), Effect(around(0.125), around(0.1))]
    return [Fidelity(2, [0.5, 0.0], influence, around(0.75)), Fidelity(5, [0.4, 0.1], influence, NOTHING)]


def printed(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def rows(table):
    lines = [line for line in printed(table).splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for line in lines if (cells := [cell.strip() for cell in line.strip("│").split("│")])}


def drawn(axes):
    return {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}


def test_bases(bases, fidelity):
    table = rows(basis_table(bases, fidelity, "title"))
    assert table["2"] == ["2", "2.500", "0.000", "1", "0.750 (0.700 to 0.800)"]
    assert table["5"][-1] == "-"
    assert len(rows(basis_table(bases, [], "title"))["2"]) == 4
    energies, influences, correlation = fidelity_figure(bases, fidelity, "title").axes
    assert drawn(energies) == {"layer 2": [2.5, 1e-9], "layer 5": [5.5, 1e-9]}  # 0 has no logarithm
    np.testing.assert_allclose(influences.collections[0].get_offsets(), [[0.5, 0.25], [1e-9, 0.125]])
    np.testing.assert_array_equal(correlation.lines[0].get_ydata(), [0.75, math.nan])
    assert len(fidelity_figure(bases, []).axes) == 1


def test_alignments():
    nothing = LensAlignment(NOTHING, around(1.0), 0)
    found = [Alignment(i, around(2.0), {"logit": LensAlignment(around(0.1 * i), around(1.0), 5), "tuned": nothing}) for i in (0, 1)]
    table = rows(alignment_table(found, "title"))
    assert table["1"] == ["2.000", "0.100 (0.050 to 0.150)", "1.000", "-", "1.000"]
    axes = alignment_figure(found, "a title with $dollars$").axes[0]
    assert drawn(axes)["logit lens"] == [0.0, 0.1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["logit lens", "tuned lens"]


def test_changed_layers():
    effect = Effect(around(0.5), around(-0.25))
    effects = [LayerEffects(0, {"delete": effect, "swap": effect}), LayerEffects(1, {"delete": effect})]
    gradients = [GradientAlignment(i, around(-0.02), around(0.96), around(-0.04)) for i in (0, 1)]
    table = rows(layers_table(effects, gradients, "title"))
    assert table["0"][:4] == ["0.500 (0.450 to 0.550)", "-0.250"] * 2
    assert table["1"][2:4] == ["-", "-"]
    assert table["1"][5:] == ["96.0 %", "-0.040"]
    changes, cosines = layers_figure(effects, gradients, "title").axes
    assert drawn(changes) == {"delete": [0.5, 0.5], "swap": [0.5]}
    assert drawn(cosines)["whole sequences"] == [-0.04, -0.04]
    assert len(layers_figure(effects, []).axes) == 1


def test_a_change_that_changes_nothing_is_drawn_on_the_logarithmic_axis():
    nothing = Effect(Interval(0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0))
    (changes,) = layers_figure([LayerEffects(0, {"swap": nothing}), LayerEffects(1, {"swap": Effect(around(0.5), around(0.1))})], []).axes
    assert drawn(changes) == {"swap": [SMALLEST, 0.5]}


@pytest.mark.parametrize("transferred", [False, True])
def test_residuals(rng, transferred):
    statistics = {}
    for layer in ("embedding", 0, 1, 2):
        statistics[layer] = ResidualStatistics(12)
        sizes = np.where(np.arange(12) < 5, 100, 1 + rng.random(12)) if layer == 1 else 1 + rng.random(12)
        statistics[layer].add(rng.standard_normal((50, 12)) * sizes)
    penalty = rng.random((3, 3))
    np.fill_diagonal(penalty, 0)
    transfer = Transfer(penalty.tolist(), penalty.tolist(), penalty.tolist()) if transferred else None
    report = residual_report(statistics, transfer, resamples=20)
    assert report.left_out == [0, 1, 2, 3, 4]
    assert report.layers[2].rogue_variance > 0.99
    table = rows(residuals_table(report, "title"))
    assert table["1"][3].endswith("and 1 more")
    assert table["embedding"][3] == "none"
    assert table["2"][-2:] == ["-", "-"]
    assert table["0"][-1] == f"{report.similarity_without_rogue[1, 2]:.3f}"
    figure = residuals_figure(report, transfer, "title")
    np.testing.assert_allclose(figure.axes[1].get_images()[0].get_array(), report.similarity_without_rogue)
    lines = correlation_lines(report)
    assert len(lines) == 2 * transferred
    if transferred:
        assert "(without rogue dimensions, 5)" in lines[1]
        points = figure.axes[2].collections[0].get_offsets()
        assert len(points) == 6  # pairs of different blocks; the embedding has no translator
        np.testing.assert_allclose(points[0], [report.similarity_without_rogue[1, 2], penalty[0][1]])


def test_nothing_is_said_twice_without_rogue_dimensions(rng):
    statistics = {layer: ResidualStatistics(3) for layer in (0, 1)}
    for each in statistics.values():
        each.add(rng.standard_normal((9, 3)))
    report = residual_report(statistics, Transfer(*[[[0.0, 1.0], [2.0, 0.0]]] * 3), resamples=10)
    assert report.left_out == []
    assert len(correlation_lines(report)) == 1
    assert len(residuals_figure(report).axes) == 2  # a matrix and its color bar


def test_a_report_of_the_translated_layers_alone(rng):
    statistics = {layer: ResidualStatistics(3) for layer in ("embedding", 0, 1, 2, 3)}
    for each in statistics.values():
        each.add(rng.standard_normal((9, 3)))
    matrix = rng.random((4, 4))
    transfer = Transfer(*[matrix.tolist()] * 3)
    kept = np.ix_([0, 2, 3], [0, 2, 3])
    some = residual_report(statistics, Transfer(*[matrix[kept].tolist()] * 3, layers=[0, 2, 3]), resamples=10)
    without = {layer: each for layer, each in statistics.items() if layer != 1}
    assert some.correlation.value == residual_report(without, transfer, resamples=10).correlation.value
    assert some.correlation.value != residual_report(statistics, transfer, resamples=10).correlation.value
    drawn = residuals_figure(some, Transfer(*[matrix[kept].tolist()] * 3, layers=[0, 2, 3]))
    (scatter,) = (axes for axes in drawn.axes if axes.get_ylabel().startswith("transfer penalty"))
    assert scatter.collections[0].get_offsets().shape == (6, 2)
    with pytest.raises(ValueError, match="no statistics of any layer"):
        residual_report({})
