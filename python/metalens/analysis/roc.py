"""The area under the receiver operating characteristic (ROC): how well a score tells two groups apart."""

from __future__ import annotations

import numpy as np

from metalens.analysis.resampling import Interval, bootstrap, ranks


def auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """Return how often a positive score lies above a negative one; ties count half. NaN if one of the groups is empty.

    Args:
        negative, positive: scores [N] and [M].
    """
    n, m = len(negative), len(positive)
    if n == 0 or m == 0:
        return float("nan")
    above = ranks(np.concatenate([negative, positive]))[n:].sum() - m * (m + 1) / 2
    return float(above / (n * m))


def bootstrap_auroc(negative: np.ndarray, positive: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return `auroc` with its bootstrap interval over both groups together.

    Args:
        negative, positive: scores [N] and [M].
        resamples, level, seed: as in `metalens.analysis.bootstrap`.
    """
    scores = np.concatenate([negative, positive])
    is_positive = np.arange(len(scores)) >= len(negative)

    def of(chosen: np.ndarray) -> float:
        drawn, which = scores[chosen], is_positive[chosen]
        return auroc(drawn[~which], drawn[which])

    return bootstrap(of, len(scores), resamples=resamples, level=level, seed=seed)
