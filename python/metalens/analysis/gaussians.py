"""Distances between the Gaussian distributions that have the mean and the covariance of hidden states of two layers, in float64.

    2-Wasserstein    sqrt(|m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2), in the unit of the hidden states; C may be singular
    KL(a || b)       (tr C_b^-1 C_a + (m_b - m_a)^T C_b^-1 (m_b - m_a) - D + log det C_b - log det C_a) / 2, in nats
    Bhattacharyya    (m_a - m_b)^T C^-1 (m_a - m_b) / 8 + (log det C - (log det C_a + log det C_b) / 2) / 2 with C = (C_a + C_b) / 2

Source of the first: Dowson and Landau (1982); tuned-lens v0.0.3 has it as gaussian_wasserstein_l2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metalens.analysis.residuals import ResidualStatistics
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class GaussianDistances:
    """Distances of the hidden states of two layers, as if they were Gaussian.

    Attributes:
        wasserstein: 2-Wasserstein distance, in the unit of the hidden states.
        kl: KL divergence in nats; None if a covariance is singular.
        bhattacharyya: Bhattacharyya distance; None if a covariance is singular.
    """

    wasserstein: float
    kl: float | None
    bhattacharyya: float | None

    @classmethod
    def of(cls, a: ResidualStatistics, b: ResidualStatistics) -> GaussianDistances:
        """Measure two layers. KL and Bhattacharyya distance need more positions than dimensions."""
        wasserstein = gaussian_wasserstein(a, b)
        try:
            return cls(wasserstein, gaussian_kl(a, b), gaussian_bhattacharyya(a, b))
        except SingularCovarianceError:
            return cls(wasserstein, None, None)


class SingularCovarianceError(InvalidValueError):
    """A covariance has no inverse."""


def gaussian_wasserstein(a: ResidualStatistics, b: ResidualStatistics) -> float:
    """Return the 2-Wasserstein distance. Work: a few D^3.

    Raises:
        InvalidValueError: if the widths differ, or for fewer than two vectors.
    """
    _require_one_width(a, b)
    # tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of F_a^T F_b, for any factors A = F_a F_a^T and B = F_b F_b^T.
    common = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    squared = np.square(a.mean - b.mean).sum() + a.variance.sum() + b.variance.sum() - 2 * common
    return float(np.sqrt(max(squared, 0.0)))


def gaussian_wasserstein_to_origin(a: ResidualStatistics) -> float:
    """Return the 2-Wasserstein distance to the origin: the square root of the mean squared length (InvalidValueError for fewer than two vectors)."""
    return float(np.sqrt(np.square(a.mean).sum() + a.variance.sum()))


def gaussian_kl(a: ResidualStatistics, b: ResidualStatistics) -> float:
    """Return KL(a || b) in nats.

    Raises:
        SingularCovarianceError: if a covariance is singular, as that of no more positions than dimensions is.
        InvalidValueError: as `gaussian_wasserstein`.
    """
    _require_one_width(a, b)
    of_a, of_b = _cholesky(a.covariance, a.count), _cholesky(b.covariance, b.count)
    spread, shift = np.linalg.solve(of_b, of_a), np.linalg.solve(of_b, b.mean - a.mean)
    return float(np.square(spread).sum() + np.square(shift).sum() - a.width + _log_det(of_b) - _log_det(of_a)) / 2


def gaussian_bhattacharyya(a: ResidualStatistics, b: ResidualStatistics) -> float:
    """Return the Bhattacharyya distance, 0 or more: -log of the overlap of the two densities. Raises as `gaussian_kl`."""
    _require_one_width(a, b)
    of_a, of_b = _cholesky(a.covariance, a.count), _cholesky(b.covariance, b.count)
    of_both = _cholesky((a.covariance + b.covariance) / 2, max(a.count, b.count))
    shift = np.linalg.solve(of_both, a.mean - b.mean)
    return float(np.square(shift).sum() / 8 + (_log_det(of_both) - (_log_det(of_a) + _log_det(of_b)) / 2) / 2)


def _require_one_width(a: ResidualStatistics, b: ResidualStatistics) -> None:
    if a.width != b.width:
        raise InvalidValueError(f"Hidden states of width {a.width} and {b.width} have no distance.")


def _factor(covariance: np.ndarray) -> np.ndarray:
    """Return F [D, D] with F F^T = covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    found: np.ndarray = vectors * np.sqrt(np.maximum(values, 0))
    return found


def _cholesky(covariance: np.ndarray, count: int) -> np.ndarray:
    """Return the lower Cholesky factor (SingularCovarianceError if there is none)."""
    width = len(covariance)
    if count > width:
        try:
            found: np.ndarray = np.linalg.cholesky(covariance)
            pivots = np.diag(found)
            if pivots.min() > 1e-7 * pivots.max():  # smaller ones are rounding errors
                return found
        except np.linalg.LinAlgError:
            pass
    raise SingularCovarianceError(
        f"The covariance of {count} positions in {width} dimensions is singular. Read more positions than dimensions, or compare by the Wasserstein "
        "distance, which needs no inverse."
    )


def _log_det(cholesky: np.ndarray) -> float:
    return 2 * float(np.log(np.diag(cholesky)).sum())
