"""The picture of KL against core seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipes.cases import FEW, LONG, LONG_TOKENS, MODELS
from benchmarks.recipes.select import Entry, mean, select
from benchmarks.time_to_quality.search import FORMER, UPSTREAM, Results, mark_of, ours, paper_seconds, runs_of
from benchmarks.time_to_quality.visits import FORMER_VERSION, TEXT

# Okabe and Ito's colors, which stay apart for color-blind readers, and a mark for each curve.
OURS_COLOR, FORMER_COLOR, TORCH_COLOR = "#D55E00", "#E69F00", "#0072B2"


def paper_curve(results: Results, comparison: Sequence[Entry], model: str) -> list[tuple[int, float]]:
    """Return (tokens, KL) of the runs of `paper`, by tokens."""
    points = {tokens: mean(found.kl) for tokens, found in runs_of(results, model, "paper").items()}
    for entry in select(comparison, model=model, line="paper", text=TEXT, seed=0):
        if entry["case"]["variant"] in ("" if MODELS[model].few is None else FEW, LONG):
            points[entry["case"]["tokens"]] = mean(entry["kl"])
    return sorted(points.items())


def draw(results: Results, comparison: Sequence[Entry], path: Path) -> None:
    """Draw a panel for each model with a mark, and save the picture."""
    marks = {model: mark for model in MODELS if (mark := mark_of(model, comparison)) is not None and ours(results, model, mark)}
    if not marks:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(marks), figsize=(max(6.5, 4.6 * len(marks)), 4.6), squeeze=False)
    for axis, (model, mark) in zip(axes.flat, marks.items(), strict=True):
        _panel(axis, results, comparison, model, mark)
    axes.flat[0].set_ylabel("held-out KL(model || lens), nats per token")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(len(marks), len(handles)), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.05 * -(-len(handles) // len(marks)), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, results: Results, comparison: Sequence[Entry], model: str, mark: float) -> None:
    """Draw the curves of a model, its mark, and the distance of the two sides along it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, vocabulary, style in (
        ("fast", "sampled", {"color": OURS_COLOR, "marker": "o", "linewidth": 2.5}),
        ("ridge", "sampled", {"color": OURS_COLOR, "marker": "s", "linestyle": ":", "linewidth": 1.5}),
        (FORMER, "full", {"color": FORMER_COLOR, "marker": "v"}),
        (FORMER_VERSION, "full", {"color": FORMER_COLOR, "marker": "^", "linestyle": "--"}),
    ):
        runs = runs_of(results, model, name, vocabulary).values()
        if runs:
            label = name if name == FORMER_VERSION else f"metalens, {name}" + (", full vocabulary" if vocabulary == "full" else "")
            axis.plot([run.seconds for run in runs], [mean(run.kl) for run in runs], label=label, markersize=6, **style)
    one = paper_seconds(results, model, tokens=1)
    if one is not None:
        tokens, kl = zip(*paper_curve(results, comparison, model), strict=True)
        label = f"{UPSTREAM}, paper's recipe (measured cost of a token x tokens)"
        axis.plot([one * n for n in tokens], kl, label=label, color=TORCH_COLOR, marker="*", markerfacecolor="white", markersize=9, linestyle="--")
    axis.axhline(mark, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    best = ours(results, model, mark)
    if best is not None and one is not None:
        ends = best[1].seconds, one * LONG_TOKENS
        axis.annotate("", (ends[0], mark), (ends[1], mark), arrowprops={"arrowstyle": "<->", "color": "black"})
        axis.annotate(f"{ends[1] / ends[0]:.0f} times", ((ends[0] * ends[1]) ** 0.5, mark), (0, 5), textcoords="offset points", ha="center")
    axis.set(title=model, xlabel="core seconds", xscale="log", yscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")
    axis.grid(which="both", alpha=0.3)
