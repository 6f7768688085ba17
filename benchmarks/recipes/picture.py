"""The pictures of the comparison, one for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.recipes.select import LEAST, LINES, Entry, models_of, select, texts_of

# Colors that stay apart for color-blind readers (Okabe and Ito), and a mark for each line.
STYLES: dict[str, dict[str, Any]] = {
    "logit lens": {"color": "#999999", "marker": "x", "linestyle": "--"},
    "ridge": {"color": "#000000", "marker": "s"},
    "fast": {"color": "#D55E00", "marker": "o", "linewidth": 3, "zorder": 3},
    "fast 0.1.0": {"color": "#E69F00", "marker": "v"},
    "muon": {"color": "#009E73", "marker": "^"},
    "adam": {"color": "#56B4E9", "marker": "D"},
    "mlxterp": {"color": "#CC79A7", "marker": "P"},
    "paper": {"color": "#0072B2", "marker": "*"},
}


def recipes(found: Sequence[Entry], folder: Path) -> None:
    """Save recipes-MODEL.png of every model: the KL of every layer, a panel for each text, a line for each recipe."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for model in models_of(found):
        entries = select(found, model=model)
        texts = texts_of(entries)
        figure, axes = plt.subplots(1, len(texts), figsize=(5.2 * len(texts) + 1.6, 4.4), squeeze=False, sharey=True)
        for axis, text in zip(axes.flat, texts, strict=True):
            _panel(axis, text, select(entries, text=text))
        axes.flat[0].set_ylabel("held-out KL(model || lens), nats per token")
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="center right", fontsize=9, frameon=False)
        figure.suptitle(f"{model}: what each recipe makes of the same tokens (lower is better)")
        figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
        figure.savefig(folder / f"recipes-{model}.png", dpi=100)
        plt.close(figure)


def _panel(axis: Any, text: str, entries: Sequence[Entry]) -> None:
    """Draw the mean over seeds of every line, and the range of the seeds as a band."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for line in LINES:
        of_line = select(entries, line=line, variant="")
        if not of_line:
            continue
        layers, values = np.array(of_line[0]["layers"]), np.array([entry["kl"] for entry in of_line])
        shown = values.mean(0) > LEAST
        layers, values = layers[shown], values[:, shown]
        axis.plot(layers, values.mean(0), label=line, markersize=6, **STYLES[line])
        axis.fill_between(layers, values.min(0), values.max(0), color=STYLES[line]["color"], alpha=0.2, linewidth=0)
    axis.set(title=f"text `{text}`".replace("`", ""), xlabel="layer", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(which="both", alpha=0.3)
