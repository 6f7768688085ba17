"""Maximize a smooth function of a unit vector: L-BFGS on the sphere, in the orthogonal complement of given vectors.

The search is a generator: it yields the point whose value it needs, and is sent the value and the gradient there. So the searches of
several layers can go on side by side, and share one evaluation. Source: Absil, Mahony and Sepulchre 2008, "Optimization algorithms on
matrix manifolds": gradients are projected on the tangent space, steps are followed by normalization, and earlier steps are transported
by projection.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

MEMORY = 20  # pairs of steps and gradients that model the curvature
LONGEST_STEP = 1.0  # radians, about
FIRST_STEP = 0.3
SUFFICIENT_RISE = 1e-4  # of the rise that the slope promises (Armijo's rule)
MOST_SHORTENINGS = 8
SLOW_STEPS = 2  # steps in a row that hardly rise, after which the search ends

# What is sent to the search: the value at the point, and the gradient [D].
Value = tuple[float, np.ndarray]


@dataclass(frozen=True)
class Maximum:
    """The end of a search.

    Attributes:
        point: [D] unit vector.
        value: value there. It is no smaller than at any point that the search has seen on its way.
        evaluations: number of points that were evaluated.
        converged: whether the search ended because it rose no more. False = the limit of evaluations ended it.
    """

    point: np.ndarray
    value: float
    evaluations: int
    converged: bool


def without(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the part of x [D] that is orthogonal to the orthonormal rows of a basis [j, D]."""
    for _ in range(2):  # once leaves the rounding of large parts
        x = x - basis.T @ (basis @ x)
    return x


def unit(x: np.ndarray) -> np.ndarray:
    """Return x / |x|."""
    scaled: np.ndarray = x / np.linalg.norm(x)
    return scaled


def maximize_on_sphere(
    start: np.ndarray, basis: np.ndarray, *, max_evaluations: int = 60, tolerance: float = 1e-4
) -> Generator[np.ndarray, Value, Maximum]:
    """Search a local maximum over unit vectors that are orthogonal to a basis.

    Args:
        start: [D] where to begin. Its part in the span of the basis is removed; the rest must not be 0.
        basis: [j, D] orthonormal rows; j may be 0.
        max_evaluations: limit of evaluations.
        tolerance: the search ends after two steps in a row that raise the value by less than this fraction of it.

    Yields:
        unit vectors [D], orthogonal to the basis.

    Returns:
        the best point found.
    """
    v = unit(without(start, basis))
    value, gradient = yield v
    slope = _tangent(gradient, v, basis)
    evaluations, slow = 1, 0
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    while evaluations < max_evaluations:
        size = float(np.linalg.norm(slope))
        if size <= tolerance * abs(value):
            return Maximum(v, value, evaluations, True)
        direction = _ascent(slope, pairs) if pairs else FIRST_STEP * slope / size
        if direction @ slope <= 1e-3 * size * float(np.linalg.norm(direction)):  # the curvature is misjudged
            pairs, direction = [], FIRST_STEP * slope / size
        direction = direction * min(1.0, LONGEST_STEP / float(np.linalg.norm(direction)))
        step, risen = 1.0, False
        for _ in range(MOST_SHORTENINGS):
            following = unit(without(v + step * direction, basis))
            new_value, new_gradient = yield following
            evaluations += 1
            risen = new_value >= value + SUFFICIENT_RISE * step * float(direction @ slope)
            if risen or evaluations >= max_evaluations:
                break
            step *= _shortening(value, new_value, step * float(direction @ slope))
        if not risen:
            if not pairs:
                return Maximum(v, value, evaluations, evaluations < max_evaluations)
            pairs = []  # try once more along the slope itself
            continue
        new_slope = _tangent(new_gradient, following, basis)
        move, change = _tangent(step * direction, following, basis), _tangent(slope, following, basis) - new_slope
        pairs = [(_tangent(s, following, basis), _tangent(y, following, basis)) for s, y in pairs]
        pairs.append((move, change))
        pairs = [(s, y) for s, y in pairs if s @ y > 1e-8 * float(np.linalg.norm(s) * np.linalg.norm(y))][-MEMORY:]
        slow = slow + 1 if new_value - value <= tolerance * abs(new_value) else 0
        v, value, slope = following, new_value, new_slope
        if slow >= SLOW_STEPS:
            return Maximum(v, value, evaluations, True)
    return Maximum(v, value, evaluations, False)


def _tangent(x: np.ndarray, v: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the part of x that is tangent to the sphere at v and orthogonal to the basis."""
    x = without(x, basis)
    tangent: np.ndarray = x - (x @ v) * v
    return tangent


def _ascent(slope: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the step of L-BFGS: the slope times an inverse of the negative curvature that the pairs show (two-loop recursion)."""
    q: np.ndarray = slope.copy()
    factors = []
    for s, y in reversed(pairs):
        factor = (s @ q) / (s @ y)
        q = q - factor * y
        factors.append(factor)
    s, y = pairs[-1]
    q = q * ((s @ y) / (y @ y))
    for (s, y), factor in zip(pairs, reversed(factors), strict=True):
        q = q + (factor - (y @ q) / (s @ y)) * s
    return q


def _shortening(value: float, new_value: float, promised: float) -> float:
    """Return the factor of the next step: the top of the parabola through both values with the promised rise, 0.1 to 0.5."""
    fall = promised - (new_value - value)
    return float(np.clip(promised / (2 * fall) if fall > 0 else 0.5, 0.1, 0.5))
