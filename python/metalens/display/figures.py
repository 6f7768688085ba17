"""The pictures of an evaluation, of layer transfer, and of several readings side by side.

A reading, a trajectory and a comparison draw their own: `Reading.plot`, `Trajectory.plot`, `Comparison.plot`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from metalens.display.colors import LENSES
from metalens.evaluation import Evaluation, Transfer
from metalens.evaluation.transfer import translated_remark
from metalens.models.layers import EMBEDDING, Layer, layers_in_order
from metalens.readings.reading import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import


def transfer_figure(transfer: Transfer, title: str = "", num_layers: int | None = None) -> Figure:
    """Draw the transfer penalty as a heat map.

    The penalty says how many nats per token the cross-entropy rises if another layer's translator reads a layer.

    Args:
        transfer: the matrices.
        title: text above the picture.
        num_layers: blocks of the model, to say so if the lens does not translate all of them. None = not known.
    """
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown, penalty = transfer.layers, transfer.penalty
    size = max(4.0, 0.25 * len(penalty) + 2.5)
    figure = NewFigure(figsize=(size + 1, size), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(penalty, cmap="viridis", origin="lower", vmin=min(0.0, *map(min, penalty)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda place, _: _tick(shown[round(place)]) if 0 <= round(place) < len(shown) else ""))
    axes.set_xlabel("output of block" if EMBEDDING not in shown else "hidden states of layer")
    axes.set_ylabel("translator of block" if EMBEDDING not in shown else "translator of layer")
    title = f"{title} {translated_remark(transfer, num_layers) or ''}".strip()
    if title:
        axes.set_title("\n".join(textwrap.wrap(title, int(8 * size))), parse_math=False)
    figure.colorbar(image, ax=axes, label="transfer penalty (nats per token)", shrink=0.9)
    return figure


def evaluation_figure(evaluation: Evaluation, title: str = "") -> Figure:
    """Draw an evaluation by layer, the tuned lens against the logit lens: KL, cross-entropy with perplexity, agreement, and bias if it is there.

    Layers that the tuned lens does not translate are left out of its curve. The embedding, if it was measured, is before block 0.

    Args:
        evaluation: the evaluation.
        title: text above all.
    """
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lenses, biases = ["logit"] if evaluation.tuned is None else ["logit", "tuned"], evaluation.bias
    measured = layers_in_order(len(evaluation.logit), evaluation.embedding is not None)
    panels = ["KL(model || lens) (nats per token)", "cross-entropy (nats per token)", "top-1 agreement with the model (%)"]
    panels += ["bias (nats per token)"] if biases is not None else []
    figure = NewFigure(figsize=(4.2 * len(panels) + 0.6, 3.8), layout="constrained")
    for place, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels)), panels, strict=True)):
        for name in lenses:
            found = {layer: scores for layer in measured if (scores := evaluation.scores(name, layer)) is not None}
            layers = [-1 if layer == EMBEDDING else layer for layer in found]
            of_bias = {} if biases is None else dict(zip(measured, [*biases.get(f"{name} {EMBEDDING}", []), *biases[name]], strict=True))
            values = [(s.kl, s.ce, 100 * s.top1, of_bias.get(layer, 0.0))[place] for layer, s in found.items()]
            score = "kl" if place == 0 else "ce"
            errors = evaluation.standard_errors(name, score) if place < 2 else None
            if errors is not None:
                of_embedding = evaluation.standard_errors(f"{name} {EMBEDDING}", score) if EMBEDDING in found else None
                spread = [errors[int(layer)] if layer != EMBEDDING else (of_embedding or [0.0])[0] for layer in found]
                low, high = ([value + sign * error for value, error in zip(values, spread, strict=True)] for sign in (-1, 1))
                axes.fill_between(layers, low, high, color=LENSES[name], alpha=0.2, linewidth=0)
            axes.plot(layers, values, marker="o" if len(layers) < 40 else None, markersize=3, color=LENSES[name], label=f"{name} lens")
        axes.set_xlabel("output of block" if evaluation.embedding is None else "layer")
        axes.set_ylabel(panel)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: _tick(EMBEDDING if place == -1 else round(place))))
        axes.grid(alpha=0.3)
        if place == 1:
            axes.axhline(evaluation.model.ce, color="0.3", linestyle="--", linewidth=1, label="model")
            perplexity = axes.secondary_yaxis("right", functions=(lambda ce: ce, lambda ce: ce))
            perplexity.set_ylabel("perplexity")
            perplexity.yaxis.set_major_formatter(lambda ce, _: f"{math.exp(min(ce, 700)):.3g}")
        axes.set_ylim(bottom=0 if place != 1 else None)
    figure.axes[1].legend(frameon=False)
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, 90)), parse_math=False)
    return figure


def _tick(layer: Layer) -> str:
    """Return the name of a layer on an axis, where there is room for four letters."""
    return "emb." if layer == EMBEDDING else str(layer)


def readings_figure(readings: Mapping[str, Reading], title: str = "") -> Figure:
    """Draw readings of one text side by side, each as `Reading.plot` draws it.

    Args:
        readings: {title: reading}, at least one.
        title: text above all.
    """
    from matplotlib.figure import Figure as NewFigure

    columns = max(len(reading.tokens) for reading in readings.values())
    rows = 1 + max(len(reading.layers) for reading in readings.values())
    figure = NewFigure(figsize=(len(readings) * (max(2.5, 0.82 * columns) + 1.9), 0.34 * rows + 1.7), layout="constrained")
    for part, (name, reading) in zip(figure.subfigures(1, len(readings), squeeze=False)[0], readings.items(), strict=True):
        reading.plot(title=name, new_figure=lambda part=part, **_: part)
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, 90)), parse_math=False)
    return figure
