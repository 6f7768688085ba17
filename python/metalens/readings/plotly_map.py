"""Interactive pictures of trajectories and comparisons by plotly: hover over a cell to see its most likely tokens."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from metalens.readings.comparison_data import ComparisonData
from metalens.readings.trajectory_data import TrajectoryData
from metalens.readings.trajectory_map import DEPTH, MapContents, contents_of, contents_of_comparison, scale_limits
from metalens.utils.errors import MissingPackageError
from metalens.utils.token_display import cut, readable, visible

# The most columns and rows whose cells show their token, and the most names along an axis.
CELLS_WITH_TEXT = 2000
NAMES = 60
TOKEN_WIDTH, ROW_HEIGHT = 62, 22  # pixels
HOVER_TOKENS = 5
HOVER_WIDTH = 24  # columns of a token in the hover text


def trajectory_plotly(trajectory: TrajectoryData, statistic: str = "entropy", title: str = "", *, depth: bool = False) -> Any:
    """Return a plotly figure of a trajectory. Hover shows the token that was read, the values, and the most likely next tokens.

    Args:
        trajectory: the trajectory.
        statistic: name of a statistic in `metalens.readings.STATISTICS`.
        title: text above the picture.
        depth: also draw the prediction depth, as a line.

    Raises:
        InvalidValueError: if there is no such statistic, or it was not computed.
        MissingPackageError: if plotly is not installed.
    """
    return _figure(contents_of(trajectory, statistic, depth=depth), title, _hover(trajectory))


def comparison_plotly(comparison: ComparisonData, divergence: str = "js", title: str = "") -> Any:
    """Return a plotly figure of a comparison. Hover shows the most likely tokens of both sides.

    Args:
        comparison: the comparison.
        divergence: 'kl', 'reverse_kl', 'js' or 'tv'.
        title: text above the picture.

    Raises:
        InvalidValueError: if there is no such divergence.
        MissingPackageError: if plotly is not installed.
    """
    contents = contents_of_comparison(comparison, divergence)
    shift = 1 if comparison.between == "layers" else 0
    of_a, of_b = (_hover(side)[start : start + len(contents.values)] for side, start in ((comparison.a, 0), (comparison.b, shift)))
    names = [html.escape(cut(visible(name), 40)) for name in comparison.names]
    hover = [[f"<b>{names[0]}</b>{a}<br><b>{names[1]}</b>{b}" for a, b in zip(*rows, strict=True)] for rows in zip(of_a, of_b, strict=True)]
    return _figure(contents, title, hover)


def _hover(trajectory: TrajectoryData) -> list[list[str]]:
    """Return the lines that name the most likely tokens of every cell [R + 1][T], the model's last. Tokens are escaped."""
    texts = {i: html.escape(cut(visible(text), HOVER_WIDTH)) for i, text in trajectory.texts.items()}
    ids = np.concatenate([trajectory.top_ids, trajectory.model.top_ids])[..., :HOVER_TOKENS].tolist()
    shares = np.concatenate([trajectory.top_probabilities, trajectory.model.top_probabilities])[..., :HOVER_TOKENS].tolist()
    return [
        ["".join(f"<br>{100 * p:5.1f} %  {texts[i]}" for i, p in zip(*cell, strict=True)) for cell in zip(*row, strict=True)]
        for row in zip(ids, shares, strict=True)
    ]


def _figure(contents: MapContents, title: str, hover: list[list[str]]) -> Any:
    try:
        from plotly import graph_objects as go
    except ImportError as error:
        raise MissingPackageError("Interactive figures need plotly 6: pip install 'metalens[plotly]'. `plot` draws with matplotlib.") from error
    values = contents.values
    rows, columns = values.shape
    shown = np.where(np.isfinite(values), values, np.nan)
    color = shown
    bar: dict[str, Any] = {"title": {"text": contents.label, "side": "right"}}
    if contents.scale == "log":
        color = np.log10(shown)
        decades = list(range(int(np.nanmax(color, initial=0)) + 1))
        bar |= {"tickvals": decades, "ticktext": [f"{10**decade:,}" for decade in decades]}
    low, high = (math.log10(end) if contents.scale == "log" else end for end in scale_limits(contents))
    tokens = [html.escape(readable(token)) for token in contents.tokens]
    with_text = contents.texts is not None and rows * columns <= CELLS_WITH_TEXT
    text = [[html.escape(readable(each)) for each in row] for row in contents.texts or []] if with_text else None
    steps = [max(1, -(-count // NAMES)) for count in (columns, rows)]
    heat_map = go.Heatmap(
        z=color,
        x=list(range(columns)),
        y=list(range(rows)),
        text=text,
        texttemplate="%{text}" if with_text else None,
        customdata=[
            [
                f"{contents.rows[r]}, position {contents.positions[c]}, after <b>{tokens[c]}</b><br>{contents.label}: {values[r, c]:.4g}{hover[r][c]}"
                for c in range(columns)
            ]
            for r in range(rows)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale="RdBu" if contents.scale == "signed" else "Viridis",
        reversescale=contents.bright_is_low,
        colorbar=bar,
        zmin=low,
        zmax=high,
    )
    figure = go.Figure(heat_map)
    if contents.depth is not None:
        edges = np.arange(columns + 1) - 0.5
        level = np.append(contents.depth, contents.depth[-1]) - 0.5
        line = {"shape": "hv", "color": "black", "width": 2}
        figure.add_trace(go.Scatter(x=edges.tolist(), y=level.tolist(), mode="lines", line=line, name=DEPTH, hoverinfo="skip"))
    width = max(480, min(TOKEN_WIDTH * columns, 1800) + 200)
    figure.update_layout(
        title={"text": html.escape(title)},
        width=width,
        height=max(260, min(ROW_HEIGHT * rows, 1200) + 160),
        xaxis={"title": {"text": "token read"}, "tickvals": list(range(0, columns, steps[0])), "ticktext": tokens[:: steps[0]]},
        yaxis={"tickvals": list(range(0, rows, steps[1])), "ticktext": contents.rows[:: steps[1]]},
        hoverlabel={"font": {"family": "monospace"}, "align": "left"},
    )
    return figure
