"""The layer x token picture of a lens."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from metalens.readings.reading import Predictions
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write

# Fonts that cover most scripts where they are installed; matplotlib falls back along the list, glyph by glyph.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS")
MAX_TOKEN = 11  # characters of a token that fit a cell


def readable(token: str) -> str:
    """A token as one visible word: spaces and line ends shown, long ones cut."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    shown = "␣" * len(shown) if shown.strip() == "" else shown.strip(" ")
    return shown if len(shown) <= MAX_TOKEN else shown[: MAX_TOKEN - 1] + "…"


def lens_figure(
    result: Predictions,
    tokens: Sequence[str],
    values: mx.array | np.ndarray,
    value_name: str,
    *,
    title: str = "",
    model_row: tuple[Sequence[str], Sequence[float]] | None = None,
    max_display_tokens: int = 15,
    figsize: tuple[float, float] | None = None,
    cmap: str = "viridis",
    font_family: str | None = None,
    limits: tuple[float, float] | None = None,
    new_figure: Callable[..., Figure] = Figure,
) -> Figure:
    """A heat map: one row per layer (the deepest on top), one column per token, the most likely next token written in each cell.

    Args:
        result: what `logit_lens` or `tuned_lens` returned, at least one layer.
        tokens: [T] the text of each position.
        values: [layers, T] what the color shows.
        value_name: its name and unit, for the color bar.
        title: above the picture.
        model_row: the model's own answer, its text and value per position, as a row on top.
        max_display_tokens: only this many last columns.
        figsize: inches; None fits the content.
        cmap: matplotlib color map.
        font_family: goes before the default fonts.
        limits: of the color scale; None fits the values. Two pictures compare only with the same limits.
        new_figure: makes the empty figure; pyplot's own for one that is to be shown.

    Raises:
        ValueError: if there is no layer or the sizes disagree.
    """
    layers = sorted(result)
    grid = np.asarray(values, dtype=float)
    if not layers:
        raise InvalidValueError("There is nothing to plot: the result holds no layers.")
    if grid.shape != (len(layers), len(tokens)) or any(len(result[layer]) != len(tokens) for layer in layers):
        raise InvalidValueError(f"The plot needs one value per layer and token, [{len(layers)}, {len(tokens)}]; got {list(grid.shape)}.")
    order = [list(result).index(layer) for layer in layers]
    grid = grid[order]
    texts = [[position[0][2] for position in result[layer]] for layer in layers]
    names = [f"layer {layer}" for layer in layers]
    if model_row is not None:
        texts.append(list(model_row[0]))
        grid = np.vstack([grid, np.asarray(model_row[1], dtype=float)[None]])
        names.append("model")
    shown = slice(max(0, len(tokens) - max_display_tokens), len(tokens))
    grid, texts, columns = grid[:, shown], [row[shown] for row in texts], list(tokens)[shown]

    fonts = [*([font_family] if font_family else []), *_installed(FONTS)]
    with mpl.rc_context({"font.family": fonts}):
        size = figsize or (max(6.0, 1.05 * len(columns) + 2.2), max(3.0, 0.42 * len(names) + 1.6))
        figure = new_figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, cmap=cmap, aspect="auto", origin="lower", vmin=limits and limits[0], vmax=limits and limits[1])
        axes.set_xticks(
            range(len(columns)), [readable(token) for token in columns], rotation=35, ha="right", rotation_mode="anchor", parse_math=False
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("token read")
        if model_row is not None:
            axes.axhline(len(names) - 1.5, color="white", linewidth=2.5)
        if title:
            axes.set_title("\n".join(textwrap.wrap(title, 90)), parse_math=False)
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                ink = _ink(*image.cmap(np.asarray(image.norm(grid[y, x])).item())[:3])
                # Tokens are text: a "$" in one opens no formula.
                axes.text(x, y, readable(text), ha="center", va="center", fontsize=9, color=ink, parse_math=False)
        figure.colorbar(image, ax=axes, label=value_name, shrink=0.9)
    return figure


def _ink(r: float, g: float, b: float) -> str:
    """Black or white, whichever reads better on this color (relative luminance, Rec. 709)."""
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.45 else "white"


def _installed(names: Sequence[str]) -> list[str]:
    present = {font.name for font in fontManager.ttflist}
    return [name for name in names if name in present] or ["sans-serif"]


def picture_format(path: Path) -> str:
    """The format that a picture's suffix names.

    Raises:
        ValueError: for a suffix that matplotlib does not write.
    """
    supported = Figure().canvas.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in supported:
        raise InvalidValueError(f"Can't write a picture as {path.name!r}: the suffix must be one of {', '.join(sorted(supported))}.")
    return kind


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture, whole or not at all; the format follows from the suffix.

    Raises:
        ValueError: for a suffix that matplotlib does not write.
        OSError: if the path can't be written.
    """
    path = Path(path)
    kind = picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=kind)


def show_lens(result: Predictions, tokens: Sequence[str], values: mx.array, value_name: str, **options: Any) -> None:
    """`lens_figure` in a window, or inline in a notebook. A result without layers shows nothing."""
    import matplotlib.pyplot as plt

    if not result:
        return
    figure = lens_figure(result, tokens, values, value_name, new_figure=plt.figure, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive.*")
        plt.show()
    plt.close(figure)
