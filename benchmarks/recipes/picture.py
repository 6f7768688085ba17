"""The pictures of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.recipes.page import LINES, PRETRAINED, Entry, models_of, select

# Colors that stay apart for color-blind readers (Okabe and Ito), and a mark for each line.
STYLES: dict[str, dict[str, Any]] = {
    "logit lens": {"color": "#999999", "marker": "x"},
    "ridge": {"color": "#000000", "marker": "s"},
    "fast": {"color": "#D55E00", "marker": "o", "linewidth": 2.5},
    "fast 0.1.0": {"color": "#E69F00", "marker": "v"},
    "muon": {"color": "#009E73", "marker": "^"},
    "adam": {"color": "#56B4E9", "marker": "D"},
    "mlxterp": {"color": "#CC79A7", "marker": "P"},
    "paper": {"color": "#0072B2", "marker": "*"},
}
TEXT = "help"
LEAST = 1e-6  # nats: the last layer is exact


def recipes(found: Sequence[Entry], path: Path) -> None:
    """Plot the KL of every layer, one panel for each model, and save the picture."""
    _panels(found, models_of(found), "kl", "held-out KL, nats per token", path)


def real_models(found: Sequence[Entry], path: Path) -> None:
    """Plot the bias of every layer of the pretrained models, one panel for each, and save the picture."""
    _panels(found, [model for model in models_of(found) if model in PRETRAINED], "bias", "bias, nats per token", path)


def _panels(found: Sequence[Entry], models: list[str], quantity: str, label: str, path: Path) -> None:
    if not models:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    rows = -(-len(models) // 2)
    figure, axes = plt.subplots(rows, min(2, len(models)), figsize=(6.5 * min(2, len(models)), 4.5 * rows), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=False):
        for line in LINES:
            for entry in select(found, model=model, line=line, variant="", text=TEXT, seed=0):  # one run each: means of other texts do not compare
                values = np.array(entry[quantity])
                shown = values > LEAST
                axis.plot(np.array(entry["layers"])[shown], values[shown], label=line, markersize=6, **STYLES[line])
        axis.set(title=f"{model}, text {TEXT}", xlabel="layer", ylabel=label, yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(which="both", alpha=0.3)
    axes.flat[0].legend(fontsize=9)
    for axis in axes.flat[len(models) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
