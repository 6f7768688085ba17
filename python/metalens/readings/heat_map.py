"""The heat map of a reading: layers by tokens. matplotlib takes a second to import, so every function imports it when it is called."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from metalens.models.layers import Layer
from metalens.readings.numbering import layer_name, upstream_layer
from metalens.readings.top_tokens import Predictions
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write
from metalens.utils.outputs import picture_output, require_replaceable
from metalens.utils.token_display import cut, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any

# Fonts that together cover most scripts. matplotlib takes each glyph from the first one that has it.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS")


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
    row_name: Callable[[Layer], str] = layer_name,
    new_figure: Callable[..., Figure] | None = None,
) -> Figure:
    """Draw a heat map: a row per layer (the last one on top, the embedding at the bottom), a column per token, in each cell the likeliest next token.

    Args:
        result: result of `logit_lens` or `tuned_lens`, at least one layer.
        tokens: text of each position, T strings.
        values: [layers, T] values that the color shows, rows in the order of `result`.
        value_name: name and unit of the values, for the color bar.
        title: text above the picture.
        model_row: token and value of the model's own prediction at each position, drawn as a row on top.
        max_display_tokens: number of columns; the last tokens are shown.
        figsize: width and height in inches; None = fit the content.
        cmap: matplotlib color map.
        font_family: font that goes before the default fonts.
        limits: ends of the color scale; None = fit the values. Two pictures can be compared only with the same limits.
        row_name: function of a layer that returns the name of its row.
        new_figure: a function that makes the empty figure. None = matplotlib's Figure; pyplot's own makes one that can
            be shown.

    Raises:
        InvalidValueError: if there is no layer or the sizes disagree.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as NewFigure

    layers = sorted(result, key=upstream_layer)  # the embedding first
    grid = np.asarray(values, dtype=float)
    if not layers:
        raise InvalidValueError("There is nothing to plot: the result holds no layers.")
    if grid.shape != (len(layers), len(tokens)) or any(len(result[layer]) != len(tokens) for layer in layers):
        raise InvalidValueError(f"The plot needs one value per layer and token, [{len(layers)}, {len(tokens)}]; got {list(grid.shape)}.")
    order = [list(result).index(layer) for layer in layers]
    grid = grid[order]
    texts = [[position[0][2] for position in result[layer]] for layer in layers]
    names = [row_name(layer) for layer in layers]
    if model_row is not None:
        texts.append(list(model_row[0]))
        grid = np.vstack([grid, np.asarray(model_row[1], dtype=float)[None]])
        names.append("model")
    shown = slice(max(0, len(tokens) - max_display_tokens), len(tokens))
    grid, texts, columns = grid[:, shown], [row[shown] for row in texts], list(tokens)[shown]

    fonts = [*([font_family] if font_family else []), *installed_fonts(FONTS)]
    drawable = drawable_by(fonts)
    with mpl.rc_context({"font.family": fonts}):
        size = figsize or (max(6.0, 1.05 * len(columns) + 2.2), max(3.0, 0.42 * len(names) + 1.6))
        figure = (new_figure or NewFigure)(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, cmap=cmap, aspect="auto", origin="lower", vmin=limits and limits[0], vmax=limits and limits[1])
        axes.set_xticks(
            range(len(columns)), [drawable(readable(token)) for token in columns], rotation=35, ha="right", rotation_mode="anchor", parse_math=False
        )
        axes.set_yticks(range(len(names)), names)
        left_out = len(tokens) - len(columns)
        axes.set_xlabel(f"token read (the last {len(columns)} of {len(tokens)})" if left_out else "token read")
        if model_row is not None:
            axes.axhline(len(names) - 1.5, color="white", linewidth=2.5)
        if title:
            axes.set_title("\n".join(textwrap.wrap(title, 90)), parse_math=False)
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                shade = ink(*image.cmap(np.asarray(image.norm(grid[y, x])).item())[:3])
                # parse_math: a "$" in a token starts no formula.
                axes.text(x, y, drawable(readable(text)), ha="center", va="center", fontsize=9, color=shade, parse_math=False)
        figure.colorbar(image, ax=axes, label=value_name, shrink=0.9)
    return figure


def ink(r: float, g: float, b: float) -> str:
    """Return black or white, the better contrast to this color (relative luminance, Rec. 709)."""
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.45 else "white"


def installed_fonts(names: Sequence[str]) -> list[str]:
    """Return those of the font families that are installed; matplotlib's own sans-serif if none is."""
    from matplotlib.font_manager import fontManager

    present = {font.name for font in fontManager.ttflist}
    return [name for name in names if name in present] or ["sans-serif"]


def drawable_by(families: Sequence[str]) -> Callable[[str], str]:
    """Return a function that spells the characters that no font of these families has, as U+5C7F, and cuts the text again.

    matplotlib would draw boxes, which all look alike, and warn of each.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known: set[int] = set()
    for family in families:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a family that the user named and that is not installed: matplotlib's default is taken
            known |= set(get_font(findfont(FontProperties(family=[family]))).get_charmap())

    def drawable(text: str) -> str:
        return cut("".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in in_visual_order(text)))

    return drawable


def in_visual_order(text: str) -> str:
    """Return a text with its runs of right-to-left letters reversed: matplotlib draws every character to the right of the one before.

    Combining marks stay behind their letters. Letters that join, as Arabic ones do, are drawn in their isolated form.
    """
    pieces: list[str] = []  # a letter with its marks, or a run of such pieces that is already reversed
    run: list[str] = []
    for character in text:
        if unicodedata.bidirectional(character) in ("R", "AL"):
            run.append(character)
        elif run and unicodedata.category(character) == "Mn":
            run[-1] += character
        else:
            pieces += [*reversed(run), character]
            run = []
    return "".join([*pieces, *reversed(run)])


def picture_format(path: Path) -> str:
    """Return the format that the suffix of a picture's path names, such as 'png'.

    Raises:
        InvalidValueError: if matplotlib does not write this format.
    """
    from matplotlib.figure import Figure as NewFigure

    supported = NewFigure().canvas.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in supported:
        raise InvalidValueError(f"Can't write a picture as {path.name!r}: the suffix must be one of {', '.join(sorted(supported))}.")
    return kind


def save_figure(figure: Figure, path: str | Path, *, force: bool = False) -> None:
    """Write a picture; the suffix tells the format. The file appears whole or not at all.

    Args:
        figure: the picture.
        path: path of the file.
        force: replace a file that is not a picture.

    Raises:
        InvalidValueError: if matplotlib does not write this format, or if the file exists and is not a picture.
        OSError: if the file cannot be written.
    """
    path = Path(path).expanduser()
    kind = picture_format(path)
    require_replaceable([picture_output(path)], force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=kind)


def show_lens(result: Predictions, tokens: Sequence[str], values: mx.array, value_name: str, **options: Any) -> None:
    """Show the picture of `lens_figure` in a window, or inline in a notebook. Arguments and errors as there."""
    import matplotlib.pyplot as plt

    figure = lens_figure(result, tokens, values, value_name, new_figure=plt.figure, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive.*")
        plt.show()
    plt.close(figure)
