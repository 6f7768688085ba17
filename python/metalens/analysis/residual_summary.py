"""What the hidden states of a text say of each layer, and how well that foretells the transfer of a lens between layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from metalens.analysis.gaussians import GaussianDistances
from metalens.analysis.resampling import Interval
from metalens.analysis.residuals import (
    ROGUE_FACTOR,
    ResidualStatistics,
    effective_rank,
    rogue_dimensions,
    similarity_matrix,
    transfer_correlation,
)
from metalens.evaluation import Transfer
from metalens.readings.numbering import Layer
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class LayerResiduals:
    """The statistics of one layer.

    Attributes:
        layer: the layer.
        mean_norm: mean length of the hidden states.
        variance: sum of the variances of all dimensions.
        effective_rank: effective rank of the covariance, 1 to D.
        rogue: rogue dimensions, largest first.
        rogue_variance: fraction of the variance in them, 0 to 1.
        to_next: distances to the next layer, as of Gaussians; None for the last layer, and if they were not asked for.
    """

    layer: Layer
    mean_norm: float
    variance: float
    effective_rank: float
    rogue: list[int]
    rogue_variance: float
    to_next: GaussianDistances | None = None


@dataclass(frozen=True, eq=False)
class ResidualReport:
    """The statistics of all layers, and their similarity.

    Attributes:
        tokens: number of positions.
        layers: statistics of each layer.
        left_out: dimensions that are rogue in some layer.
        similarity: [R, R] covariance similarity of the layers, with all dimensions.
        similarity_without_rogue: [R, R] the same without `left_out`.
        correlation: rank correlation of similarity and transfer penalty over pairs of layers; None without a transfer.
        correlation_without_rogue: the same for `similarity_without_rogue`.
    """

    tokens: int
    layers: list[LayerResiduals]
    left_out: list[int]
    similarity: np.ndarray
    similarity_without_rogue: np.ndarray
    correlation: Interval | None = None
    correlation_without_rogue: Interval | None = None


def residual_report(
    statistics: Mapping[Layer, ResidualStatistics],
    transfer: Transfer | None = None,
    *,
    factor: float = ROGUE_FACTOR,
    distances: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> ResidualReport:
    """Summarize the statistics of all layers.

    Args:
        statistics: {layer: statistics}, as `residual_statistics` returns them.
        transfer: layer transfer of a lens on the same model, for its rank correlation with the similarity. Layers without statistics are left out.
        factor: as in `rogue_dimensions`.
        distances: also measure the distance of each layer to the next one, as of Gaussians. Takes a few D^3 for each layer.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.

    Raises:
        InvalidValueError: if there are no statistics, or too few positions.
    """
    if not statistics:
        raise InvalidValueError("There are no statistics of any layer. Choose at least one layer.")
    layers, left_out, following = [], set(), [*statistics.values()][1:]
    for i, (layer, each) in enumerate(statistics.items()):
        variance, rogue = each.variance, rogue_dimensions(each, factor)
        total = float(variance.sum())
        share = float(variance[rogue].sum()) / total if total > 0 else 0.0
        to_next = GaussianDistances.of(each, following[i]) if distances and i < len(following) else None
        layers.append(LayerResiduals(layer, each.mean_norm, total, effective_rank(each.covariance), rogue, share, to_next))
        left_out |= set(rogue)
    whole, without_rogue = (similarity_matrix(list(statistics.values()), dimensions) for dimensions in (set[int](), left_out))
    correlations: list[Interval | None] = [None, None]
    if transfer is not None:
        common = [layer for layer in statistics if layer in transfer.layers]
        rows, columns = ([layers.index(layer) for layer in common] for layers in (list(statistics), transfer.layers))
        penalty = np.array(transfer.penalty)[np.ix_(columns, columns)]
        correlations = [transfer_correlation(s[np.ix_(rows, rows)], penalty, resamples=resamples, seed=seed) for s in (whole, without_rogue)]
    count = next(iter(statistics.values())).count
    return ResidualReport(count, layers, sorted(left_out), whole, without_rogue, *correlations)
