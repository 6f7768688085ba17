"""Fit a Dirichlet distribution to predictions: the greatest likelihood, from the mean log-probabilities alone (upstream's LogitStats.mle).

For a concentration a [V] the mean log-likelihood is F(a) = lgamma(sum a) - sum lgamma(a_k) + sum (a_k - 1) s_k. F is
concave, and its Hessian is diagonal plus a constant, so a Newton step takes O(V) (Minka 2000, "Estimating a Dirichlet
distribution"). If a step leaves the domain or overshoots, a step of Minka's fixed point replaces it, which never makes
F smaller.
"""

from __future__ import annotations

import math

import numpy as np

from metalens.utils.errors import InvalidValueError

# digamma and trigamma are written here because metalens does not depend on scipy.
_lgamma = np.vectorize(math.lgamma, otypes=[float])


def dirichlet_mle(s: np.ndarray, max_iterations: int = 1000, tolerance: float = 1e-9) -> np.ndarray:
    """Return the concentration [V] with the greatest likelihood.

    Args:
        s: [V] mean log-probabilities in nats, float64.
        max_iterations: limit of iterations; the estimate after the last one is returned.
        tolerance: bound of |dF/da_k| a_k, relative to sum a, at which the search ends.

    Raises:
        InvalidValueError: if all predictions are the same: the likelihood has no maximum.
    """
    if not np.exp(s).sum() < 1 - 1e-9:
        raise InvalidValueError(
            "There is no Dirichlet distribution of greatest likelihood: all predictions are the same. Read a text with more tokens."
        )
    a, best = np.ones_like(s), -np.inf
    for _ in range(max_iterations):
        best = max(best, _mean_log_likelihood(a, s))
        gradient = digamma(a.sum()) - digamma(a) + s
        if np.abs(gradient * a).max() <= tolerance * a.sum():
            break
        diagonal, constant = -trigamma(a), trigamma(a.sum())
        shift = (gradient / diagonal).sum() / (1 / constant + (1 / diagonal).sum())
        newton = a - (gradient - shift) / diagonal
        better = bool((newton > 0).all()) and _mean_log_likelihood(newton, s) >= best
        a = newton if better else inverse_digamma(digamma(a.sum()) + s)
    return a


def _mean_log_likelihood(a: np.ndarray, s: np.ndarray) -> float:
    return math.lgamma(a.sum()) - float(_lgamma(a).sum()) + float((a - 1) @ s)


def digamma(x: np.ndarray) -> np.ndarray:
    """Return d/dx log gamma(x) for x > 0, within 1e-12: the recurrence raises x to 8 or more, then the asymptotic series applies."""
    x, result = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for _ in range(8):
        small = x < 8
        result = result - np.where(small, 1 / x, 0)
        x = x + small
    y = 1 / x**2
    series: np.ndarray = result + np.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y * (1 / 132 - y * 691 / 32760)))))
    return series


def trigamma(x: np.ndarray) -> np.ndarray:
    """Return the derivative of `digamma` for x > 0, by the same method."""
    x, result = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for _ in range(8):
        small = x < 8
        result = result + np.where(small, 1 / x**2, 0)
        x = x + small
    y = 1 / x**2
    series: np.ndarray = result + 1 / x + y / 2 + y / x * (1 / 6 - y * (1 / 30 - y * (1 / 42 - y * (1 / 30 - y * (5 / 66 - y * 691 / 2730)))))
    return series


def inverse_digamma(y: np.ndarray) -> np.ndarray:
    """Return x > 0 with digamma(x) = y: six Newton steps from Minka's starting value."""
    x: np.ndarray = np.where(y >= -2.22, np.exp(np.minimum(y, 700.0)) + 0.5, -1 / (np.minimum(y, -1.0) - digamma(np.array(1.0))))
    for _ in range(6):
        x = x - (digamma(x) - y) / trigamma(x)
    return x
