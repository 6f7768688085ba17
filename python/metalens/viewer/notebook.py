"""Saved trajectories and comparisons as HTML for notebooks: the page in a frame of its own."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metalens.viewer.page import document, page

HEIGHT = 560  # pixels


def notebook_html(content: Mapping[str, Any], height: int = HEIGHT) -> str:
    """Return a document as HTML for the output of a notebook's cell: the page in a frame of its own, which cannot reach the notebook.

    Args:
        content: result of `document`.
        height: height of the frame in pixels.
    """
    source = html.escape(page(content), quote=True)
    return (
        f'<iframe title="metalens" sandbox="allow-scripts allow-downloads" srcdoc="{source}" '
        f'style="width:100%;height:{int(height)}px;border:1px solid #8884;border-radius:8px"></iframe>'
    )


def trajectory_html(trajectory: Mapping[str, Any]) -> str:
    """Return the page with a trajectory, as `Trajectory.to_json` returns it."""
    return notebook_html(document([{"name": "A", "trajectories": [trajectory]}], _title(trajectory)))


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """Return the page with a comparison, as `Comparison.to_json` returns it with its trajectories.

    Two lenses are shown on one text, two texts or models side by side, and neighboring layers on their trajectory.
    """
    a, b = comparison["a"], comparison["b"]
    if comparison["between"] == "layers":
        of_layers = {**comparison, "a": None, "of": [[0, 0], [0, 0]]}
        return notebook_html(document([{"name": "A", "trajectories": [a]}], _title(a), [of_layers], statistic="layers:js"))
    lenses = comparison["between"] == "lenses"
    texts = [{"name": "A", "trajectories": [b, a]}] if lenses else [{"name": "A", "trajectories": [a]}, {"name": "B", "trajectories": [b]}]
    of = [[0, 1], [0, 0]] if lenses else [[0, 0], [1, 0]]
    return notebook_html(document(texts, _title(a), [{**comparison, "a": None, "b": None, "of": of}]))


def _title(trajectory: Mapping[str, Any]) -> str:
    name = trajectory["model"]["name"]
    return " · ".join(filter(None, [name and Path(name).name, trajectory["lens"]["name"]]))
