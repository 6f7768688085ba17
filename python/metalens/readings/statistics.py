"""The statistics of a trajectory: their names, labels and units, and the arrays that hold them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from metalens.ops import LensStats


class StatisticInfo(NamedTuple):
    """What people need to read a statistic.

    Attributes:
        label: name of the statistic.
        unit: 'nats', or '' for a number without a unit.
    """

    label: str
    unit: str


# {attribute of Cells: its label and unit}, in the order of tables and files
STATISTICS = {
    "entropy": StatisticInfo("entropy", "nats"),
    "max_probability": StatisticInfo("probability of the top token", ""),
    "kl": StatisticInfo("KL(model || lens)", "nats"),
    "reverse_kl": StatisticInfo("KL(lens || model)", "nats"),
    "cross_entropy": StatisticInfo("cross-entropy of the target", "nats"),
    "rank": StatisticInfo("rank of the target", ""),
    "log_prob_difference": StatisticInfo("log p(target) - log p(anti-target)", "nats"),
    "agrees": StatisticInfo("same top token as the model", ""),
}
# {attribute of Comparison: its label and unit}
DIVERGENCES = {
    "kl": StatisticInfo("KL(a || b)", "nats"),
    "reverse_kl": StatisticInfo("KL(b || a)", "nats"),
    "js": StatisticInfo("Jensen-Shannon divergence", "nats"),
    "tv": StatisticInfo("total variation", ""),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Cells:
    """Statistics of rows x positions, as NumPy arrays [R, T]; float32 unless stated. None = not computed.

    Attributes:
        lse: log-sum-exp of the logits.
        entropy: entropy of the prediction, in nats.
        max_probability: probability of the most likely token, 0 to 1.
        top_ids: [R, T, k] int32, the most likely tokens, most likely first.
        top_logits: [R, T, k] their logits.
        kl: KL(model || row), in nats.
        reverse_kl: KL(row || model), in nats.
        agrees: 1 where the most likely token is the model's, else 0.
        cross_entropy: -log p(target), in nats. NaN at a position without a target.
        rank: int32 rank of the target, 1 = most likely. -1 at a position without a target.
        log_prob_difference: log p(target) - log p(anti-target), in nats.
        chosen_log_probs: [C, R, T] log-probabilities of the chosen tokens.
        chosen_ranks: [C, R, T] int32 ranks of the chosen tokens.
    """

    lse: np.ndarray
    entropy: np.ndarray
    max_probability: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    kl: np.ndarray | None = None
    reverse_kl: np.ndarray | None = None
    agrees: np.ndarray | None = None
    cross_entropy: np.ndarray | None = None
    rank: np.ndarray | None = None
    log_prob_difference: np.ndarray | None = None
    chosen_log_probs: np.ndarray
    chosen_ranks: np.ndarray

    @property
    def top_probabilities(self) -> np.ndarray:
        """Return the probabilities [R, T, k] of the top tokens, most likely first."""
        found: np.ndarray = np.exp(self.top_logits - self.lse[..., None])
        return found

    @property
    def chosen_probabilities(self) -> np.ndarray:
        """Return the probabilities [C, R, T] of the chosen tokens."""
        found: np.ndarray = np.exp(self.chosen_log_probs)
        return found

    def statistics(self) -> dict[str, np.ndarray]:
        """Return the statistics of STATISTICS that were computed, by name."""
        found = {name: getattr(self, name) for name in STATISTICS}
        return {name: values for name, values in found.items() if values is not None}

    def lens_stats(self) -> LensStats:
        """Return the arrays in the form of `metalens.ops.lens_stats`."""
        nll, rank = self.cross_entropy, self.rank
        optional = [None if a is None else mx.array(a) for a in (self.kl, self.agrees, nll, rank, self.reverse_kl)]
        return LensStats(*(mx.array(a) for a in (self.lse, self.entropy, self.max_probability, self.top_ids, self.top_logits)), *optional)


def cells_of(stats: LensStats, targets: int, anti_targets: int) -> Cells:
    """Return the cells of evaluated statistics.

    Args:
        stats: statistics of [R, T] rows. Their labels [T, C'], or [T] for one, are the target if `targets` is 1, then the anti-target if
            `anti_targets` is 1, then the chosen tokens.
        targets, anti_targets: 0 or 1.
    """
    shape = tuple(stats.lse.shape)
    nll = np.zeros((*shape, 0), np.float32) if stats.nll is None else np.array(stats.nll).reshape(*shape, -1)
    ranks = np.zeros((*shape, 0), np.int32) if stats.rank is None else np.array(stats.rank).reshape(*shape, -1)
    chosen = slice(targets + anti_targets, None)
    return Cells(
        lse=np.array(stats.lse),
        entropy=np.array(stats.entropy),
        max_probability=np.array(stats.max_probability),
        top_ids=np.array(stats.top_ids),
        top_logits=np.array(stats.top_logits),
        kl=_array(stats.kl),
        reverse_kl=_array(stats.reverse_kl),
        agrees=None if stats.agrees is None else np.array(stats.agrees).astype(np.float32),
        cross_entropy=nll[..., 0] if targets else None,
        rank=ranks[..., 0] if targets else None,
        log_prob_difference=nll[..., 1] - nll[..., 0] if anti_targets else None,
        chosen_log_probs=np.moveaxis(-nll[..., chosen], -1, 0),
        chosen_ranks=np.moveaxis(ranks[..., chosen], -1, 0),
    )


def _array(a: mx.array | None) -> np.ndarray | None:
    return None if a is None else np.array(a)


def settled_from(same: np.ndarray) -> np.ndarray:
    """Return for each column [N] the first of S rows from which on every entry of same [S, N] is true; S if the last one is false."""
    depth: np.ndarray = same.shape[0] - np.minimum.accumulate(same[::-1], axis=0).sum(axis=0)
    return depth


def select_cells(cells: Cells, rows: Any, columns: Any) -> Cells:
    """Return some rows and columns. Both are indices of NumPy that keep the axis: slices or lists."""
    arrays = {}
    for name, array in cell_arrays(cells).items():
        lead = (slice(None),) if name.startswith("chosen") else ()
        arrays[name] = array[(*lead, rows)][(*lead, slice(None), columns)]
    return replace(cells, **arrays)


def join_cells(parts: list[Cells]) -> Cells:
    """Join parts of a text along the positions."""
    names = cell_arrays(parts[0])
    return replace(
        parts[0],
        **{name: np.concatenate([getattr(part, name) for part in parts], axis=2 if name.startswith("chosen") else 1) for name in names},
    )


def cell_arrays(cells: Cells) -> dict[str, Any]:
    """Return every array of the cells that is there, by name."""
    found = {field.name: getattr(cells, field.name) for field in fields(Cells)}
    return {name: array for name, array in found.items() if array is not None}
