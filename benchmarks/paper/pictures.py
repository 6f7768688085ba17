"""The picture of the reproduction: cross-entropy, bias and deleted blocks by layer, a column for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.paper.page import Entry, select
from benchmarks.paper.subjects import MODELS

from metalens.display.colors import LENSES

ROWS = {"perplexity": "cross-entropy (nats)", "bias": "bias (nats)", "deletion": "rise of the cross-entropy\nwithout the block (nats)"}


def paper(found: Sequence[Entry], folder: Path) -> None:
    """Save paper.png: a row for each measure, a column for each model that has results."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = [name for name in MODELS if select(found, model=name, experiment="perplexity")]
    if not models:
        return
    figure, grid = plt.subplots(len(ROWS), len(models), figsize=(3.4 * len(models) + 1, 2.7 * len(ROWS)), squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        for row, (experiment, label) in enumerate(ROWS.items()):
            axis = grid[row][column]
            results = [entry["result"] for entry in select(found, model=model, experiment=experiment)]
            if results:
                _panel(axis, experiment, results)
                axis.grid(alpha=0.3)
            else:
                axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
            axis.set(xlabel="layer" if row == len(ROWS) - 1 else "", ylabel=label if column == 0 else "", title=model if row == 0 else "")
    grid[0][0].legend(frameon=False)
    figure.savefig(folder / "paper.png", dpi=100)
    plt.close(figure)


def _panel(axis: Any, experiment: str, results: Sequence[dict[str, Any]]) -> None:
    if experiment == "deletion":
        values = np.array(results[0]["ce"])
        axis.errorbar(range(len(values)), values[:, 0], np.abs(values[:, 1:] - values[:, :1]).T, color="#000000", marker="o", markersize=3)
        return
    for name, color in LENSES.items():
        of_seed = np.array([np.mean(each[name]["ce"], axis=0) if experiment == "perplexity" else each[name] for each in results])
        axis.plot(of_seed.mean(0), color=color, marker="o", markersize=3, label=f"{name} lens")
        axis.fill_between(range(of_seed.shape[1]), of_seed.min(0), of_seed.max(0), color=color, alpha=0.2, linewidth=0)
    if experiment == "perplexity":
        axis.axhline(np.mean(results[0]["model_ce"]), color="0.3", linestyle="--", linewidth=1, label="model")
