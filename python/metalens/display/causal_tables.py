"""Tables of causal analyses: bases and their fidelity, alignment, changed layers, residual statistics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from metalens.analysis.alignment import Alignment
from metalens.analysis.causal_basis import CausalBasis
from metalens.analysis.changed_layers import LayerEffects
from metalens.analysis.fidelity import Fidelity
from metalens.analysis.gaussians import GaussianDistances
from metalens.analysis.resampling import Interval
from metalens.analysis.residual_summary import ResidualReport
from metalens.analysis.update_gradients import GradientAlignment
from metalens.display.format import decimals, interval, percent

MOST_DIMENSIONS = 4  # rogue dimensions that a cell names


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, style="table.title"))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def basis_table(bases: Sequence[CausalBasis], fidelity: Sequence[Fidelity], title: str) -> Table:
    """Make a table with a row for each layer: the energies of its first directions, and its causal fidelity.

    Args:
        bases: a basis for each layer.
        fidelity: the fidelity of the same layers; empty = not measured.
        title: text above the table.
    """
    columns = ["layer", "directions", "energy of the first\n(nats per token)", "of the last", "searches\nat their end"]
    table = _table(title, *columns, *(["rank correlation with the\ninfluence on the model"] if fidelity else []))
    for i, basis in enumerate(bases):
        first, last = decimals(float(basis.energies[0])), decimals(float(basis.energies[-1]))
        rho = [interval(fidelity[i].correlation)] if fidelity else []
        table.add_row(str(basis.layer), str(len(basis)), first, last, f"{int(np.sum(basis.converged))}", *rho)
    return table


def alignment_table(alignments: Sequence[Alignment], title: str) -> Table:
    """Make a table with a row for each layer, and the stimulus-response alignment of each lens.

    Args:
        alignments: one for each layer.
        title: text above the table.
    """
    names = list(alignments[0].lenses) if alignments else []
    table = _table(
        title, "layer", "response\n(nats)", *(column for name in names for column in (f"{name} lens\nalignment", f"{name} lens\nstimulus (nats)"))
    )
    for each in alignments:
        cells = [cell for lens in each.lenses.values() for cell in (interval(lens.similarity), decimals(lens.stimulus.value))]
        table.add_row(str(each.layer), decimals(each.response.value), *cells)
    return table


def layers_table(effects: Sequence[LayerEffects], gradients: Sequence[GradientAlignment], title: str) -> Table:
    """Make a table with a row for each layer: the KL to the intact model under each change, and the cosine with the gradient.

    Args:
        effects: the effects of each layer.
        gradients: the gradient alignment of every block; empty = not measured.
        title: text above the table.
    """
    names = list(dict.fromkeys(name for each in effects for name in each.effects))
    of_gradient = ["cosine with\nthe gradient", "positions\nbelow 0", "cosine of\nsequences"] if gradients else []
    by_layer = {each.layer: each for each in gradients}
    table = _table(title, "layer", *(column for name in names for column in (f"{name}\nKL (nats per token)", f"{name}\nrise of CE")), *of_gradient)
    for each in effects:
        cells = []
        for name in names:
            effect = each.effects.get(name)
            cells += ["-", "-"] if effect is None else [interval(effect.kl), decimals(effect.ce.value)]
        if each.layer in by_layer:
            found = by_layer[each.layer]
            cells += [interval(found.cosine), percent(found.negative.value), decimals(found.sequence_cosine.value)]
        table.add_row(str(each.layer), *cells)
    return table


def residuals_table(report: ResidualReport, title: str) -> Table:
    """Make a table with a row for each layer: size, variance, effective rank and rogue dimensions of its hidden states.

    Args:
        report: the statistics.
        title: text above the table.
    """
    distances = any(each.to_next is not None for each in report.layers)
    table = _table(
        title,
        "layer",
        "mean norm",
        "variance",
        "effective\nrank",
        "rogue\ndimensions",
        "their share\nof the variance",
        "similarity\nto the next",
        "without\nrogue",
        *(["Wasserstein\nto the next", "KL\nto the next", "Bhattacharyya\nto the next"] if distances else []),
    )
    for i, each in enumerate(report.layers):
        named = ", ".join(map(str, each.rogue[:MOST_DIMENSIONS]))
        more = f" and {len(each.rogue) - MOST_DIMENSIONS} more" if len(each.rogue) > MOST_DIMENSIONS else ""
        following = i + 1 < len(report.layers)
        similar = [decimals(float(m[i, i + 1])) if following else "-" for m in (report.similarity, report.similarity_without_rogue)]
        table.add_row(
            str(each.layer), f"{each.mean_norm:.4g}", f"{each.variance:.4g}", f"{each.effective_rank:.1f}", f"{named}{more}" or "none",
            percent(each.rogue_variance), *similar, *(_distances(each.to_next) if distances else []),
        )  # fmt: skip
    return table


def _distances(found: GaussianDistances | None) -> list[str]:
    """Return the cells of the distances to the next layer; those of the last layer, and those of a singular covariance, are empty."""
    if found is None:
        return ["-"] * 3
    return ["-" if value is None else f"{value:.4g}" for value in (found.wasserstein, found.kl, found.bhattacharyya)]


def correlation_lines(report: ResidualReport) -> list[str]:
    """Return the rank correlations with the transfer penalty as lines of text; [] without a transfer."""
    named: dict[str, Interval | None] = {"all dimensions": report.correlation}
    if report.left_out:
        named[f"without rogue dimensions, {len(report.left_out)}"] = report.correlation_without_rogue
    return [
        f"Rank correlation of covariance similarity ({name}) and transfer penalty: {interval(found)}"
        for name, found in named.items()
        if found is not None
    ]
