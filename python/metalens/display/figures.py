"""Pictures of a reading and of layer transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from metalens.evaluation import Transfer
from metalens.readings.reading import Reading
from metalens.utils.arrays import to_list

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TOKENS = 24  # columns of the picture of a reading


def reading_figure(reading: Reading, title: str = "", color: Literal["probability", "entropy"] = "probability") -> Figure:
    """Draw the heat map of a reading: a row for each layer, the model's own prediction on top, and a column for each of the last 24 tokens.

    Args:
        reading: the reading.
        title: text above the picture.
        color: statistic that the color shows: the probability of the top token, or the entropy (nats). Bright is certain in both.
    """
    from metalens.readings.heat_map import lens_figure  # matplotlib is slow to import

    if color == "probability":
        values, model_values, name = reading.stats.max_probability, reading.model.max_probability, "probability of the top token"
    else:
        values, model_values, name = reading.stats.entropy, reading.model.entropy, "entropy (nats)"
    return lens_figure(
        reading.predictions,
        reading.tokens,
        values,
        name,
        title=title,
        model_row=(reading.model_tokens, to_list(model_values[0])),
        max_display_tokens=MOST_TOKENS,
        cmap="viridis" if color == "probability" else "viridis_r",
        limits=(0.0, 1.0) if color == "probability" else None,  # two pictures of probabilities can be compared
    )


def transfer_figure(transfer: Transfer, title: str = "") -> Figure:
    """Draw the transfer penalty as a heat map.

    The penalty says how many nats per token the cross-entropy rises if another layer's translator reads a layer.
    """
    from matplotlib.figure import Figure  # slow to import

    penalty = transfer.penalty
    size = max(4.0, 0.25 * len(penalty) + 2.5)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(penalty, cmap="viridis", origin="lower", vmin=min(0.0, *map(min, penalty)))
    axes.set_xlabel("output of block")
    axes.set_ylabel("translator of block")
    if title:
        axes.set_title(title, parse_math=False)
    figure.colorbar(image, ax=axes, label="transfer penalty (nats per token)", shrink=0.9)
    return figure
