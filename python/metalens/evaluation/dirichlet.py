"""The Dirichlet distribution of greatest likelihood, from the mean log-probabilities alone (upstream's LogitStats.mle).

For a concentration a [V] the mean log-likelihood is F(a) = lgamma(sum a) - sum lgamma(a_k) + sum (a_k - 1) s_k. It is concave, and its Hessian is
diagonal plus a constant, so that a Newton step takes O(V) (Minka 2000, "Estimating a Dirichlet distribution"). Where a step leaves the domain or
overshoots, Minka's fixed point, which never makes F smaller, takes its place.
"""

from __future__ import annotations

import math

import numpy as np

from metalens.utils.errors import InvalidValueError

_lgamma = np.vectorize(math.lgamma, otypes=[float])


def dirichlet_mle(s: np.ndarray, max_iterations: int = 1000, tolerance: float = 1e-9) -> np.ndarray:
    """The concentration [V] whose likelihood is greatest.

    Args:
        s: [V] mean log-probabilities in nats, float64.
        max_iterations: at most so many; the last estimate is returned if they do not suffice.
        tolerance: of the gradient dF/da_k times a_k, relative to sum a, where the search ends.

    Raises:
        ValueError: if there is no greatest one, because all predictions were the same.
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
    """d/dx log gamma(x) for x > 0: recurrence up to x >= 8, then the asymptotic series; 1e-12."""
    x, result = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for _ in range(8):
        small = x < 8
        result = result - np.where(small, 1 / x, 0)
        x = x + small
    y = 1 / x**2
    series: np.ndarray = result + np.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y * (1 / 132 - y * 691 / 32760)))))
    return series


def trigamma(x: np.ndarray) -> np.ndarray:
    """The derivative of `digamma`, likewise."""
    x, result = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for _ in range(8):
        small = x < 8
        result = result + np.where(small, 1 / x**2, 0)
        x = x + small
    y = 1 / x**2
    series: np.ndarray = result + 1 / x + y / 2 + y / x * (1 / 6 - y * (1 / 30 - y * (1 / 42 - y * (1 / 30 - y * (5 / 66 - y * 691 / 2730)))))
    return series


def inverse_digamma(y: np.ndarray) -> np.ndarray:
    """The x > 0 with digamma(x) = y: Newton's steps from Minka's start."""
    x: np.ndarray = np.where(y >= -2.22, np.exp(np.minimum(y, 700.0)) + 0.5, -1 / (np.minimum(y, -1.0) - digamma(np.array(1.0))))
    for _ in range(6):
        x = x - (digamma(x) - y) / trigamma(x)
    return x
