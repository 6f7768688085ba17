"""Pictures of causal analyses: causal fidelity, stimulus-response alignment, changed layers, covariance similarity."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metalens.analysis.alignment import Alignment
from metalens.analysis.causal_basis import CausalBasis
from metalens.analysis.changed_layers import LayerEffects
from metalens.analysis.fidelity import Fidelity
from metalens.analysis.resampling import Interval
from metalens.analysis.residual_summary import ResidualReport
from metalens.analysis.update_gradients import GradientAlignment
from metalens.display.colors import CYCLE, LENSES, colors_of
from metalens.evaluation import Transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib takes a second to import

SMALLEST = 1e-9  # nats; logarithmic axes have no 0


def fidelity_figure(bases: Sequence[CausalBasis], fidelity: Sequence[Fidelity], title: str = "") -> Figure:
    """Draw the energies of the directions; and, if it was measured, their influence on lens and model, and the correlation by layer.

    Args:
        bases: a basis for each layer.
        fidelity: the fidelity of the same layers; empty = not measured.
        title: text above all.
    """
    import matplotlib as mpl

    figure = _figure(3 if fidelity else 1)
    panels = figure.subplots(1, 3 if fidelity else 1, squeeze=False)[0]
    last = max((basis.layer for basis in bases), default=1) or 1
    colors = [mpl.colormaps["viridis"](basis.layer / last) for basis in bases]
    for basis, color in zip(bases, colors, strict=True):
        energies = np.maximum(basis.energies, SMALLEST)
        panels[0].plot(np.arange(1, len(basis) + 1), energies, marker="o", markersize=3, color=color, label=f"layer {basis.layer}")
    _label(panels[0], "direction, in the order of extraction", "energy (nats per token)")
    _logarithmic(panels[0], "y")
    if len(bases) <= 8:
        panels[0].legend(frameon=False, fontsize=8)
    if fidelity:
        for each, color in zip(fidelity, colors, strict=True):
            model = np.maximum([effect.kl.value for effect in each.model_influence], SMALLEST)
            panels[1].scatter(np.maximum(each.lens_influence, SMALLEST), model, s=16, color=color)
        _logarithmic(panels[1], "x", "y")
        _label(panels[1], "influence on the lens (nats per token)", "influence on the model (nats per token)")
        _curve(panels[2], [each.layer for each in fidelity], [each.correlation for each in fidelity], LENSES["tuned"], None)
        panels[2].set_ylim(-1.05, 1.05)
        _label(panels[2], "layer", "rank correlation of both influences")
    return _titled(figure, title)


def alignment_figure(alignments: Sequence[Alignment], title: str = "") -> Figure:
    """Draw the stimulus-response alignment of each lens by layer (Belrose et al. 2023, figure 9).

    Args:
        alignments: one for each layer.
        title: text above all.
    """
    figure = _figure(1)
    axes = figure.subplots()
    layers = [each.layer for each in alignments]
    for name in alignments[0].lenses if alignments else ():
        _curve(axes, layers, [each.lenses[name].similarity for each in alignments], LENSES[name], f"{name} lens")
    _label(axes, "layer", "Aitchison similarity of stimulus and response")
    axes.set_ylim(top=1.02)
    axes.legend(frameon=False)
    return _titled(figure, title)


def layers_figure(effects: Sequence[LayerEffects], gradients: Sequence[GradientAlignment], title: str = "") -> Figure:
    """Draw the KL to the intact model by changed layer; and, if it was measured, the cosine of updates and gradients.

    Args:
        effects: the effects of each layer.
        gradients: the gradient alignment of every block; empty = not measured.
        title: text above all.
    """
    figure = _figure(2 if gradients else 1)
    panels = figure.subplots(1, 2 if gradients else 1, squeeze=False)[0]
    names = list(dict.fromkeys(name for each in effects for name in each.effects))
    _logarithmic(panels[0], "y")
    colors = colors_of(names)
    for name in names:
        there = [each for each in effects if name in each.effects]
        _curve(panels[0], [each.layer for each in there], [each.effects[name].kl for each in there], colors[name], name)
    _label(panels[0], "changed block", "KL(model || changed model) (nats per token)")
    panels[0].legend(frameon=False)
    if gradients:
        layers = [each.layer for each in gradients]
        _curve(panels[1], layers, [each.cosine for each in gradients], CYCLE[0], "mean over positions")
        _curve(panels[1], layers, [each.sequence_cosine for each in gradients], CYCLE[1], "whole sequences")
        panels[1].axhline(0, color="0.3", linewidth=1)
        _label(panels[1], "block", "cosine of what the block adds and the gradient")
        panels[1].legend(frameon=False)
    return _titled(figure, title)


def residuals_figure(report: ResidualReport, transfer: Transfer | None = None, title: str = "") -> Figure:
    """Draw the covariance similarity of the layers, with and without rogue dimensions; and its relation to the transfer penalty.

    Args:
        report: the statistics.
        transfer: the layer transfer that the report has a correlation with.
        title: text above all.
    """
    matrices = {"all dimensions": report.similarity}
    if report.left_out:
        matrices[f"without rogue dimensions ({len(report.left_out)})"] = report.similarity_without_rogue
    count = len(matrices) + (transfer is not None)
    figure = _figure(count)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=False):
        image = axes.imshow(matrix, cmap="viridis", origin="lower", vmin=0, vmax=1)
        names = [str(each.layer) for each in report.layers]
        ticks = np.unique(np.linspace(0, len(names) - 1, min(len(names), 12)).round().astype(int))
        axes.set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, [names[i] for i in ticks])
        axes.set_title(f"covariance similarity, {name}", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8)
    if transfer is not None:
        rows = {each.layer: i for i, each in enumerate(report.layers)}
        places = {layer: i for i, layer in enumerate(transfer.layers) if layer in rows}
        pairs = [(a, b) for a in places for b in places if a != b]
        penalty = [transfer.penalty[places[a]][places[b]] for a, b in pairs]
        panels[-1].scatter([report.similarity_without_rogue[rows[a], rows[b]] for a, b in pairs], penalty, s=8, color=LENSES["tuned"], alpha=0.5)
        _label(panels[-1], "covariance similarity, without rogue dimensions", "transfer penalty (nats per token)")
    return _titled(figure, title)


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure as NewFigure

    return NewFigure(figsize=(4.4 * panels + 0.8, 4.0), layout="constrained")


def _titled(figure: Figure, title: str) -> Figure:
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, 60 * max(1, len(figure.axes) - 1))), parse_math=False)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _logarithmic(axes: Axes, *names: Literal["x", "y"]) -> None:
    """Make axes logarithmic, with plain numbers at 1, 2 and 5 of each decade: they also fit where the values span less than one."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _curve(axes: Axes, x: Sequence[int], values: Sequence[Interval], color: str, label: str | None) -> None:
    """Draw values with their intervals as a band. On a logarithmic axis, values of 0 are drawn as SMALLEST."""
    least = SMALLEST if axes.get_yscale() == "log" else -math.inf
    middle, low, high = ([max(getattr(each, name), least) for each in values] for name in ("value", "low", "high"))
    axes.plot(x, middle, marker="o", markersize=3, color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
