"""Draw the picture of the report: bars of the other implementations' times divided by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = {
    "PyTorch float32": "#d1603d",
    "PyTorch bf16": "#e8a33d",
    "PyTorch int4": "#8c5a9e",
    "plain MLX": "#4c78a8",
    "metalens": "#2a9d8f",
}
OTHER = "#8a8a8a"
BAR_INCHES, GAP_BARS = 0.17, 0.7


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw one panel per table, one group of bars per case and one bar per peer, with the 20th and 80th percentile."""
    titles = [t for t in dict.fromkeys(case["title"] for case in results["cases"]) if any(c["peers"] for c in results["cases"] if c["title"] == t)]
    panels = [[case for case in results["cases"] if case["title"] == title and case["peers"]] for title in titles]
    heights = [sum(len(case["peers"]) + GAP_BARS for case in cases) for cases in panels]
    figure = Figure(figsize=(10, BAR_INCHES * sum(heights) + 0.95 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for title, cases, axis in zip(titles, panels, axes, strict=True):
        _panel(axis, title, cases)
    machine = results["machine"]
    axes[-1].set_xlabel("time of the other implementation / time of metalens in the same round (1 = equally fast)", fontsize=8)
    figure.suptitle(
        f"metalens beside other implementations: {machine['cpu']}, {machine['cores']} cores, {machine['kernels']}\nmedian, 20th and 80th percentile",
        fontsize=10,
    )
    figure.savefig(file, dpi=110)


def _panel(axis: Any, title: str, cases: list[dict[str, Any]]) -> None:
    """Draw the bars of one table."""
    top, ticks, labels = 0.0, [], []
    for case in cases:
        ticks.append(top + (len(case["peers"]) - 1) / 2)
        labels.append(case["label"] + ("" if case["name"] == "metalens" else f"\n({case['name']})"))
        for name, peer in case["peers"].items():
            ratio = peer["ratio"]
            errors = [[max(0.0, ratio["p50"] - ratio["p20"])], [max(0.0, ratio["p80"] - ratio["p50"])]]
            # Bars begin at 1: on the logarithmic axis, a bar to the left means that the other implementation is faster.
            axis.barh(top, ratio["p50"] - 1, left=1, height=0.85, color=COLORS.get(name, OTHER), xerr=errors, error_kw={"lw": 0.8, "alpha": 0.6})
            end = max(ratio["p80"], 1)
            axis.text(end * 1.05, top, f"{ratio['p50']:.2g}  {name}", va="center", fontsize=6.5)
            top += 1
        top += GAP_BARS
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    low = min(peer["ratio"]["p20"] for case in cases for peer in case["peers"].values())
    high = max(peer["ratio"]["p80"] for case in cases for peer in case["peers"].values())
    axis.set_xlim(min(0.8, low / 1.2), max(3.0, high * 4))
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
