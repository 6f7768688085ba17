"""The picture of layer transfer. (A reading draws its own: `Reading.plot`.)"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from metalens.evaluation import Transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import


def transfer_figure(transfer: Transfer, title: str = "") -> Figure:
    """Draw the transfer penalty as a heat map.

    The penalty says how many nats per token the cross-entropy rises if another layer's translator reads a layer.
    """
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import MaxNLocator

    penalty = transfer.penalty
    size = max(4.0, 0.25 * len(penalty) + 2.5)
    figure = NewFigure(figsize=(size + 1, size), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(penalty, cmap="viridis", origin="lower", vmin=min(0.0, *map(min, penalty)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_xlabel("output of block")
    axes.set_ylabel("translator of block")
    if title:
        axes.set_title("\n".join(textwrap.wrap(title, int(8 * size))), parse_math=False)
    figure.colorbar(image, ax=axes, label="transfer penalty (nats per token)", shrink=0.9)
    return figure
