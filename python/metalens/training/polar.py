"""Polynomials for the orthogonal factor of a matrix, approximately and with products alone: U V^T for U S V^T. `ops.muon_direction` applies them.

An odd polynomial p of a matrix is the same polynomial of its singular values: p(X) = U p(S) V^T. A few of them one after the other, each the best on
the interval that the one before has left, bring all singular values of [low, 1] to within `error` of 1. Amsel et al. 2025 ("The Polar Express",
section 3) choose the coefficients in this way. Muon's usual coefficients leave singular values about 0.3 off, however often they are applied, and
need one iteration more to come that near.

X X^T and its polynomials are symmetric: half of their products is computed. So a polynomial of degree 5 of a square matrix costs as much as two
products, four halves. Two of degree 9, five halves each, come as near to 1 as three of degree 5. But beyond 1 they are so steep that a singular
value of 1.005 becomes 87, and operands of 16 bits raise one above 1 where it makes up nearly all of a matrix: with Gemma 3 `fast` ended at 1.74 nats
in place of 1.64.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from metalens.ops.muon import Polynomial

# The smallest singular value that the polynomials are made for, relative to 1 / sqrt(rows): all singular values of a matrix of Frobenius norm 1 have
# that size if they are equal. Held-out KL after 288 steps of 128 tokens on the demo model (256 rows): 0.7700, 0.7684, 0.7682, 0.7693 for 0.8, 0.32,
# 0.16, 0.05 with three iterations; 0.7679 for 0.16 with four; 0.7684 with four of Muon's usual iterations.
SMALLEST = 0.16
# Largest distance of a singular value from 1. On SmolLM2-135M-Instruct (576 rows, 80 steps of 128 tokens; layers 0, 11, 22) KL is 3.503, 2.513, 1.250
# with an iteration more, and 3.506, 2.519, 1.253 with this.
ERROR = 0.5
HALVES = 4  # halves of a product of square matrices that a polynomial of degree 5 costs
SLACK = 1.01  # rounded operands may raise a singular value above 1, where a polynomial is steep


@cache
def best_polynomial(low: float, high: float) -> tuple[Polynomial, float]:
    """Return (a, b, c) for which a s + b s^3 + c s^5 is nearest to 1 on all of [low, high], 0 < low <= high, and the largest distance from 1.

    Remez's algorithm: the extreme errors alternate in sign. They lie at both ends and at the two zeros of the derivative between.
    """
    if high - low < 1e-3 * high:  # the points would coincide: the limit is the Taylor polynomial of degree 2 in 1 - s^2
        s = (low + high) / 2
        return (15 / 8 / s, -10 / 8 / s**3, 3 / 8 / s**5), ((high - low) / 2 / s) ** 3 * 5 / 2
    inner = low + (high - low) * np.array([0.25, 0.75])
    while True:
        points = np.array([low, *inner, high])
        a, b, c, error = np.linalg.solve(np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        found = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        if np.abs(found - inner).max() < 1e-9 * high:
            return (float(a), float(b), float(c)), abs(float(error))
        inner = found


@cache
def polynomials(rows: int, iterations: int | None = None) -> tuple[tuple[Polynomial, ...], float]:
    """Return the polynomials for matrices of a size, and the largest distance from 1 that they leave for singular values from SMALLEST on.

    Args:
        rows: the shorter side of the matrices, at least 1.
        iterations: number of polynomials. None = until the distance is at most ERROR: 3 for 59 to 1056 rows, 4 up to 19,097, then 5.
    """
    low, high, error = min(1.0, SMALLEST / math.sqrt(rows)), 1.0, math.inf
    found: list[Polynomial] = []
    while len(found) < iterations if iterations is not None else error > ERROR:
        polynomial, error = best_polynomial(low, high)
        found.append(polynomial)
        low, high = 1 - error, 1 + error
    return tuple(found), error
