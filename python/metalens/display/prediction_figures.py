"""Pictures of answers by layer, of the difficulty of examples, and of anomalies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metalens.analysis.anomalies import Detection
from metalens.analysis.layer_accuracy import LayerAccuracy
from metalens.display.colors import colors_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import


def accuracy_figure(found: Mapping[str, Sequence[LayerAccuracy]], title: str = "", chance: float | None = None) -> Figure:
    """Draw accuracy and calibration error by layer, with the intervals of the accuracy. Dashed lines are the model itself.

    Args:
        found: {name: accuracy of every layer, and last of the model}.
        title: text above all.
        chance: accuracy of guesses, drawn as a dotted line. None = none.
    """
    errors = all(column[0].calibration_error is not None for column in found.values())
    figure, panels = _figure(2 if errors else 1, title)
    colors = colors_of(found)
    for name, column in found.items():
        color = colors[name]
        *by_layer, model = column
        layers = [each.layer for each in by_layer]
        panels[0].plot(layers, [each.accuracy.value for each in by_layer], color=color, marker="o", markersize=3, label=name)
        ends = [each.accuracy.low for each in by_layer], [each.accuracy.high for each in by_layer]
        panels[0].fill_between(layers, *ends, color=color, alpha=0.15, linewidth=0)
        panels[0].axhline(model.accuracy.value, color=color, linestyle="--", linewidth=1)
        if errors:
            panels[1].plot(layers, [each.calibration_error for each in by_layer], color=color, marker="o", markersize=3, label=name)
            panels[1].axhline(model.calibration_error, color=color, linestyle="--", linewidth=1)
    if chance is not None:
        panels[0].axhline(chance, color="0.5", linestyle=":", linewidth=1, label="chance")
    for axes, name in zip(panels, ("accuracy", "expected calibration error"), strict=False):
        axes.set_xlabel("output of block")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    return figure


def depth_figure(depths: Mapping[str, np.ndarray], layers: Sequence[int], learned: np.ndarray | None = None, title: str = "") -> Figure:
    """Draw how many examples settle at each layer, and beside it the mean depth of the examples that were learned at each step.

    Args:
        depths: {name of the lens: prediction depth of every example}, as rows of `layers`.
        layers: the layers.
        learned: iteration learned of every example. None = one panel.
        title: text above all.
    """
    figure, panels = _figure(1 if learned is None else 2, title)
    colors = colors_of(depths)
    for name, found in depths.items():
        color = colors[name]
        settled = [float((found <= row).mean()) for row in range(len(layers))]
        panels[0].step(layers, settled, where="post", color=color, label=name)
        if learned is not None:
            steps = np.unique(learned)
            panels[1].plot(steps, [found[learned == step].mean() for step in steps], color=color, marker="o", markersize=3, label=name)
    panels[0].set_xlabel("output of block")
    panels[0].set_ylabel("fraction of predictions that have settled")
    panels[0].set_ylim(0, 1)
    panels[0].legend(frameon=False)
    if learned is not None:
        panels[1].set_xlabel("iteration learned (step)")
        panels[1].set_ylabel("mean prediction depth (layers)")
    return figure


def detection_figure(found: Mapping[str, Sequence[Detection]], title: str = "") -> Figure:
    """Draw the ROC curves of detectors, one panel for each lens or kind of features.

    Args:
        found: {name of the lens or features: detections}.
        title: text above all.
    """
    figure, panels = _figure(len(found), title)
    for axes, (name, detections) in zip(panels, found.items(), strict=True):
        colors = colors_of(each.method for each in detections)
        for each in detections:
            false, true = each.curve()
            axes.plot(false, true, color=colors[each.method], label=f"{each.method}, {each.auroc.value:.2f}")
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
        axes.set_title(name, parse_math=False)
        axes.set_xlabel("normal prompts flagged")
        axes.set_ylabel("anomalous prompts flagged")
        axes.legend(frameon=False, loc="lower right")
    return figure


def _figure(panels: int, title: str) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(4.6 * panels + 0.4, 3.8), layout="constrained")
    found = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in found:
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, 50 * panels)), parse_math=False)
    return figure, found
