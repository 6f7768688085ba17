"""Tables and pictures of answers, depths, anomalies and weights: they show the numbers that they were given."""

import io

import numpy as np
import pytest
from rich.console import Console

from metalens.analysis import Detection, Interval, LayerAccuracy, WeightReading
from metalens.display.prediction_figures import accuracy_figure, depth_figure, detection_figure
from metalens.display.prediction_tables import accuracy_table, depth_table, detection_table, weight_table


def shown(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def accuracies(*values, calibrated=0.5, error=0.25):
    layers = [*range(len(values) - 1), None]
    return [LayerAccuracy(i, Interval(v, v - 0.1, v + 0.1), calibrated, error, 0.5) for i, v in zip(layers, values, strict=True)]


@pytest.fixture
def detection():
    normal, anomalous = np.array([0.0, 1.0, 2.0, 3.0]), np.array([2.5, 4.0])
    return Detection("mahalanobis", Interval(0.875, 0.5, 1.0), 12, normal, anomalous)


def test_accuracies_side_by_side():
    text = shown(accuracy_table({"true": accuracies(0.3, 0.6), "false": accuracies(0.2, 0.4)}, "a [title]"))
    assert "a [title]" in text
    assert "30.0 % (20 to 40)" in text
    row = next(line for line in text.splitlines() if "model" in line)
    assert row.index("60.0 %") < row.index("40.0 %")
    assert "ECE" in text
    cloze = shown(accuracy_table({"cloze": accuracies(0.3, 0.6, calibrated=None, error=None)}, ""))
    assert "ECE" not in cloze
    assert "calibrated" not in cloze


def test_accuracy_curves_have_the_model_as_a_line():
    figure = accuracy_figure({"logit lens": accuracies(0.3, 0.5, 0.9)}, "title", chance=0.25)
    left, right = figure.axes
    curve, model, chance = left.lines
    assert curve.get_ydata().tolist() == [0.3, 0.5]
    assert list(model.get_ydata()) == [0.9, 0.9]
    assert list(chance.get_ydata()) == [0.25, 0.25]
    assert right.lines[0].get_ydata().tolist() == [0.25, 0.25]
    assert len(accuracy_figure({"cloze": accuracies(0.3, 0.6, error=None)}).axes) == 1


def test_depths_are_cumulated():
    depths = {"tuned lens": np.array([0, 0, 1, 3]), "logit lens": np.array([2, 2, 2, 2])}
    lines = shown(depth_table(depths, [4, 5, 9], "t")).splitlines()
    row = next(line for line in lines if " 5 " in line)
    assert "75.0 %" in row
    assert "0.0 %" in row
    assert "1.00" in next(line for line in lines if "mean depth" in line)
    left, right = depth_figure(depths, [4, 5, 9], np.array([0, 0, 10, 100])).axes
    assert left.lines[0].get_ydata().tolist() == [0.5, 0.75, 0.75]
    assert right.lines[0].get_xdata().tolist() == [0, 10, 100]
    assert right.lines[0].get_ydata().tolist() == [0, 1, 3]
    assert len(depth_figure(depths, [4, 5, 9]).axes) == 1


def test_detections(detection):
    text = shown(detection_table({"logit lens": [detection], "tuned lens": [detection]}, "t"))
    assert text.count("0.875 (0.500 to 1.000)") == 2
    (panel,) = detection_figure({"logit lens": [detection]}).axes
    curve = panel.lines[0]
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == [(0, 0), (0, 0.5), (0.25, 0.5), (0.25, 1), (0.5, 1), (0.75, 1), (1, 1)]


def test_weights_name_their_tokens():
    ids = np.array([[0, 1], [2, 3]])
    texts = {0: " sea", 1: "[red]", 2: "\n", 3: " sky"}
    some = np.array([0.5, 0.25])
    reading = WeightReading(
        3, "mlp.down_proj", "logit lens", some, some, ids, np.ones((2, 2)), ids[::-1], np.ones((2, 2)), np.array([0.1, np.nan]), texts
    )
    text = shown(weight_table(reading, [1, 0], "t"))
    rows = [line for line in text.splitlines() if "0.250" in line or "0.500" in line]
    assert "sky" in rows[0][: rows[0].index("sea")]  # row 1 promotes what row 0 suppresses
    assert "[red]" in rows[1]
    assert "nan" not in text
