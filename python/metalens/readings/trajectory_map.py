"""Pictures of trajectories and comparisons by matplotlib: layers by positions, any statistic as the color.

A small map shows the most likely token in each cell. A large one, up to 80 layers and thousands of tokens, shows the colors alone, and names every
n-th token and layer.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalens.readings.comparison_data import ComparisonData
from metalens.readings.heat_map import FONTS, drawable_by, ink, installed_fonts
from metalens.readings.numbering import EMBEDDING, UNTRANSLATED
from metalens.readings.statistics import DIVERGENCES, STATISTICS
from metalens.readings.trajectory_data import TrajectoryData
from metalens.utils.errors import InvalidValueError
from metalens.utils.token_display import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import

# The most columns and rows whose cells have room for their token.
CELLS_WITH_TEXT = (24, 40)
# The most names along an axis of a large map.
NAMES = 40
DEPTH = "prediction depth: from here on the top token is the model's"


class MapContents(NamedTuple):
    """What a map shows, whoever draws it.

    Attributes:
        values: [R, T] the color; NaN = no value.
        texts: [R][T] most likely token of each cell, in full. None = none.
        rows: name of each row, from the lowest up.
        tokens: text of each token that was read.
        positions: number of each position.
        label: name and unit of the values.
        scale: 'linear', 'log' (for ranks) or 'signed' (0 in the middle).
        limits: ends of the scale, or None for those of the values.
        bright_is_low: whether low values are the certain ones.
        depth: [T] prediction depth, as a row; None = no line for it.
    """

    values: np.ndarray
    texts: list[list[str]] | None
    rows: list[str]
    tokens: list[str]
    positions: range
    label: str
    scale: str
    limits: tuple[float, float] | None
    bright_is_low: bool
    depth: np.ndarray | None = None


def contents_of(trajectory: TrajectoryData, statistic: str, *, depth: bool = False) -> MapContents:
    """Return what the map of a trajectory shows: its rows, and the model's own on top.

    Args:
        trajectory: the trajectory.
        statistic: name of a statistic in STATISTICS.
        depth: also show the prediction depth, as a line.

    Raises:
        InvalidValueError: if there is no such statistic, or it was not computed.
    """
    known = trajectory.statistics()
    if statistic not in known:
        missing = "was not computed for this trajectory" if statistic in STATISTICS else "is no statistic"
        raise InvalidValueError(f"{statistic!r} {missing}; there are {', '.join(known)}.")
    values = np.concatenate([known[statistic], trajectory.model.statistics()[statistic]]).astype(float)
    if statistic == "rank":
        values[values < 0] = np.nan
    best = np.concatenate([trajectory.top_ids[..., 0], trajectory.model.top_ids[..., 0]])
    texts = [[trajectory.texts[int(i)] for i in row] for row in best]
    scale = {"rank": "log", "log_prob_difference": "signed"}.get(statistic, "linear")
    limits = (0.0, 1.0) if statistic in ("max_probability", "agrees") else None
    low = statistic not in ("max_probability", "agrees", "log_prob_difference")
    rows = [*(trajectory.label(layer) for layer in trajectory.layers), "model"]
    label, line = label_of(*STATISTICS[statistic]), trajectory.prediction_depth if depth else None
    return MapContents(values, texts, rows, trajectory.tokens, trajectory.positions, label, scale, limits, low, line)


def contents_of_comparison(comparison: ComparisonData, divergence: str) -> MapContents:
    """Return what the map of a comparison shows.

    Raises:
        InvalidValueError: if there is no such divergence.
    """
    if divergence not in DIVERGENCES:
        raise InvalidValueError(f"{divergence!r} is no divergence; there are {', '.join(DIVERGENCES)}.")
    c = comparison
    tokens = [a if a == b else f"{a}|{b}" for a, b in zip(c.a.tokens, c.b.tokens, strict=True)]
    info = DIVERGENCES[divergence]
    return MapContents(getattr(c, divergence).astype(float), None, list(c.labels), tokens, c.a.positions, label_of(*info), "linear", None, False)


def label_of(label: str, unit: str) -> str:
    """Return 'entropy (nats)', or the label alone if there is no unit."""
    return f"{label} ({unit})" if unit else label


def map_figure(contents: MapContents, title: str = "", *, cmap: str | None = None, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw a map: the lowest layer at the bottom, one column for each position.

    Args:
        contents: what to show.
        title: text above the picture.
        cmap: matplotlib color map. None = viridis, with the certain end bright; for signed values one with a white middle.
        figsize: width and height in inches. None = fit the content.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as NewFigure

    values, (rows, columns) = contents.values, contents.values.shape
    small = columns <= CELLS_WITH_TEXT[0] and rows <= CELLS_WITH_TEXT[1]
    default = (max(6.0, 1.05 * columns + 2.6), max(3.0, 0.42 * rows + 1.6)) if small else (14.0, min(12.0, 0.16 * rows + 3.0))
    fonts = installed_fonts(FONTS)
    drawable = drawable_by(fonts)
    with mpl.rc_context({"font.family": fonts}):
        figure = NewFigure(figsize=figsize or default, layout="constrained")
        axes = figure.subplots()
        colors = mpl.colormaps[cmap or _color_map(contents)].with_extremes(bad="0.85")
        image = axes.imshow(np.ma.masked_invalid(values), cmap=colors, aspect="auto", origin="lower", norm=_norm(contents))
        steps = [max(1, -(-count // (NAMES if not small else count))) for count in (columns, rows)]
        named = range(0, columns, steps[0])
        names = [drawable(readable(contents.tokens[i])) for i in named]
        if not small:
            names = [f"{contents.positions[i]} {name}" for i, name in zip(named, names, strict=True)]
        axes.set_xticks(named, names, rotation=35 if small else 90, ha="right" if small else "center", rotation_mode="anchor" if small else "default")
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
            label.set_fontsize(9 if small else 7)
        shown = range(0, rows, steps[1])
        axes.set_yticks(shown, [contents.rows[i] for i in shown], fontsize=9 if small else 7)
        axes.set_xlabel("token read" + (f" (every {_ordinal(steps[0])} of {columns} is named)" if steps[0] > 1 else ""))
        if contents.rows[-1] == "model":
            axes.axhline(rows - 1.5, color="white", linewidth=2.5 if small else 1)
        if contents.depth is not None:
            edges = np.arange(columns + 1) - 0.5
            for color, width in (("white", 4.0), ("black", 1.6)):
                axes.stairs(contents.depth - 0.5, edges, baseline=None, color=color, linewidth=width if small else width / 2, label=DEPTH)
        if small and contents.texts is not None:
            for y, row in enumerate(contents.texts):
                for x, text in enumerate(row):
                    known = np.isfinite(values[y, x])
                    color = ink(*image.cmap(np.asarray(image.norm(values[y, x])).item())[:3]) if known else "black"
                    axes.text(x, y, drawable(readable(text)), ha="center", va="center", fontsize=9, color=color, parse_math=False)
        starred = any(name.endswith("*") for name in contents.rows)
        notes = [f"({UNTRANSLATED})" if starred else "", f"(line: {DEPTH})" if contents.depth is not None else ""]
        title = " ".join(filter(None, [title, *notes]))
        if title:
            axes.set_title("\n".join(textwrap.wrap(title, 90)), parse_math=False)
        beyond = np.nanmax(np.where(np.isposinf(values), np.nan, values), initial=-np.inf) > (image.norm.vmax or 0)
        figure.colorbar(image, ax=axes, label=contents.label, shrink=0.9, extend="max" if beyond else "neither")
    return figure


def _color_map(contents: MapContents) -> str:
    if contents.scale == "signed":
        return "RdBu"
    return "viridis_r" if contents.bright_is_low else "viridis"


def scale_limits(contents: MapContents) -> tuple[float, float]:
    """Return the ends of the scale. Values of the embedding and infinite ones may lie beyond it, and take the color of its end."""
    # The embedding is so far from every other layer that they would all have one color.
    others = [row for row, name in enumerate(contents.rows) if not name.startswith(EMBEDDING)]
    finite = contents.values[others] if others else contents.values
    finite = finite[np.isfinite(finite)]
    low, high = contents.limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if contents.scale == "signed":
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    if contents.scale == "log":
        low, high = max(low, 1.0), max(high, 2.0)
    return low, high if high > low else low + 1


def _norm(contents: MapContents) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if contents.scale == "log" else Normalize)(*scale_limits(contents))


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
