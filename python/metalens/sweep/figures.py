"""The pictures of a sweep: values by layer, for models, recipes and transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metalens.display.colors import LENSES, colors_of
from metalens.sweep.document import values_at
from metalens.sweep.results import Found, names_in, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import

LOGIT = {"color": LENSES["logit"], "linestyle": "--", "linewidth": 1.2}

BLOCKS = "output of block"

Curve = tuple[Sequence[float], Sequence[float]]


def layers_of(found: Found) -> list[int]:
    """Return the layers that the lens of an evaluation translates."""
    return [int(layer) for layer in values_at(found.result, "evaluation.layers[tuned].layer")]


def by_recipe(found: Sequence[Found], value: str, label: str) -> Figure:
    """Draw a value by layer: a panel for each model, a line for each recipe, and the logit lens. Seeds are a band around their mean.

    Args:
        found: evaluations of lenses on their own models, of one text.
        value: the value: 'kl', 'ce', 'bias', ...
        label: name of the value, with its unit.
    """
    panels = {}
    for model in names_in(found, "model"):
        of_model = select(found, model=model)
        layers = layers_of(of_model[0])
        lines = {recipe: _seeds(select(of_model, recipe=recipe), value) for recipe in names_in(of_model, "recipe")}
        lines["logit lens"] = [values_at(of_model[0].result, f"evaluation.layers[tuned].logit.{value}")]
        panels[str(model)] = {name: [(layers, line) for line in values if len(line) == len(layers)] for name, values in lines.items()}
    return _panels(panels, BLOCKS, label)


def by_size(found: Sequence[Found], label: str) -> Figure:
    """Draw the KL by relative layer: a panel for each recipe, a line for each model.

    Args:
        found: evaluations of lenses on their own models, of one text.
        label: name of the value, with its unit.
    """
    panels = {
        str(recipe): {str(model): [_relative(each) for each in select(found, recipe=recipe, model=model)] for model in names_in(found, "model")}
        for recipe in names_in(found, "recipe")
    }
    return _panels(panels, "layer, as a part of all", label)


def by_transfer(found: Sequence[Found], label: str) -> Figure:
    """Draw the KL by layer: a panel for each model, a line for each model whose lens it is read with.

    Args:
        found: evaluations of one text, recipe and seed.
        label: name of the value, with its unit.
    """
    panels: dict[str, dict[str, list[Curve]]] = {}
    for each in found:
        name = "its own lens" if each.own else f"lens of {each.names['lens_model']}"
        curve = (layers_of(each), values_at(each.result, "evaluation.layers[tuned].tuned.kl"))
        panels.setdefault(str(each.names["model"]), {})[name] = [curve]
    return _panels(panels, BLOCKS, label)


def _seeds(found: Sequence[Found], value: str) -> list[list[float]]:
    return [values_at(each.result, f"evaluation.layers[tuned].tuned.{value}") for each in found]


def _relative(found: Found) -> Curve:
    last = max(len(found.result["evaluation"]["layers"]) - 1, 1)
    return [layer / last for layer in layers_of(found)], values_at(found.result, "evaluation.layers[tuned].tuned.kl")


def _panels(panels: Mapping[str, Mapping[str, Sequence[Curve]]], x_label: str, y_label: str) -> Figure:
    """Draw panels of lines. Several curves of one line have the same x; the line is their mean, with a band from the least to the largest."""
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = NewFigure(figsize=(4.4 * columns + 1.4, 3.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    colors = colors_of(name for lines in panels.values() for name in ["logit lens", *lines])
    handles: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, curves in lines.items():
            if not curves:
                continue
            x, values = np.asarray(curves[0][0]), np.asarray([curve[1] for curve in curves])
            style = LOGIT if name == "logit lens" else {"color": colors[name], "marker": "o" if len(x) < 40 else None, "markersize": 3}
            (handles[name],) = axis.plot(x, values.mean(0), **style)
            if len(values) > 1:
                axis.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
        axis.set_title(title, parse_math=False)
        axis.set_xlabel(x_label)
        if x_label == BLOCKS:
            axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylabel(y_label)
    for text in figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False).get_texts():
        text.set_parse_math(False)
    return figure
