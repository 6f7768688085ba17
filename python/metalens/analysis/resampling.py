"""Rank correlation and bootstrap intervals: how sure a figure from a few samples is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from metalens.utils.errors import InvalidValueError


class Interval(NamedTuple):
    """A value with its bootstrap interval.

    Attributes:
        value: the value for the samples as they are.
        low, high: ends of the interval. NaN if there are fewer than two samples, or no resample has a value.
    """

    value: float
    low: float
    high: float


def ranks(x: ArrayLike) -> np.ndarray:
    """Return the ranks [N] of numbers, 1 = smallest. Equal numbers share the mean of their ranks."""
    values = np.asarray(x, np.float64)
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: np.ndarray = last - (counts - 1) / 2
    return mean[group]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation of two samples [N]: the correlation of their ranks.

    Returns:
        -1 to 1; NaN if one of the samples has fewer than two different values.

    Raises:
        InvalidValueError: if the samples have different lengths, or a number is NaN.
    """
    a, b = (np.asarray(sample, np.float64).reshape(-1) for sample in (x, y))
    if a.shape != b.shape or np.isnan(a).any() or np.isnan(b).any():
        raise InvalidValueError(f"A rank correlation needs two samples of one length without NaN, got {a.size} and {b.size} numbers.")
    a, b = (ranks(sample) - (sample.size + 1) / 2 for sample in (a, b))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


def bootstrap(statistic: Callable[[np.ndarray], float], size: int, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Compute the percentile bootstrap interval of a statistic (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic: a function of the indices of samples, [size] integers with repetitions, that returns the value for them. NaN = none.
        size: number of samples.
        resamples: number of times that `size` samples are drawn with replacement.
        level: probability of the interval, between 0 and 1.
        seed: seed of the draws. The global state of random numbers is left alone.

    Returns:
        the value for all samples, and the quantiles (1 - level) / 2 and (1 + level) / 2 of the values for the draws.

    Raises:
        InvalidValueError: if there are no samples, or an argument is out of range.
    """
    if size < 1 or resamples < 1 or not 0 < level < 1:
        raise InvalidValueError(
            f"A bootstrap needs a sample, a resample and a level between 0 and 1; got size={size}, resamples={resamples}, level={level}."
        )
    value = float(statistic(np.arange(size)))
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(0, size, size)) for _ in range(resamples)]) if size > 1 else np.empty(0)
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def bootstrap_mean(values: ArrayLike, weights: ArrayLike | None = None, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Compute the mean of samples [N] with its bootstrap interval.

    Args:
        values: the samples, for example one mean for each sequence.
        weights: [N] positive weights of the samples, for example their numbers of tokens. None = equal.
        resamples, level, seed: as in `bootstrap`.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)

    def mean(chosen: np.ndarray) -> float:
        return float(x[chosen] @ w[chosen] / w[chosen].sum())

    return bootstrap(mean, x.size, resamples=resamples, level=level, seed=seed)
