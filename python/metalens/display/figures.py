"""The pictures of layer transfer, and of several readings side by side. (A reading draws its own: `Reading.plot`.)"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metalens.evaluation import Transfer
from metalens.readings.reading import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import


def transfer_figure(transfer: Transfer, title: str = "", layers: Sequence[int] | None = None) -> Figure:
    """Draw the transfer penalty as a heat map.

    The penalty says how many nats per token the cross-entropy rises if another layer's translator reads a layer.

    Args:
        transfer: the matrices.
        title: text above the picture.
        layers: layers to draw: those that the lens translates. None = all.
    """
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = list(range(len(transfer.penalty)) if layers is None else layers)
    penalty = [[transfer.penalty[row][column] for column in shown] for row in shown]
    size = max(4.0, 0.25 * len(penalty) + 2.5)
    figure = NewFigure(figsize=(size + 1, size), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(penalty, cmap="viridis", origin="lower", vmin=min(0.0, *map(min, penalty)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda place, _: str(shown[round(place)]) if 0 <= round(place) < len(shown) else ""))
    axes.set_xlabel("output of block")
    axes.set_ylabel("translator of block")
    if len(shown) < len(transfer.penalty):
        title = f"{title} (the {len(shown)} layers that the lens translates)".strip()
    if title:
        axes.set_title("\n".join(textwrap.wrap(title, int(8 * size))), parse_math=False)
    figure.colorbar(image, ax=axes, label="transfer penalty (nats per token)", shrink=0.9)
    return figure


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
