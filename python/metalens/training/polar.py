"""The orthogonal factor of a matrix, approximately and with products alone: U V^T for U S V^T.

An odd polynomial p of a matrix is the same polynomial of its singular values: p(X) = U p(S) V^T. A few quintics one after the other, each the best on
the interval that the one before has left, bring all singular values of [low, 1] to within `error` of 1. Amsel et al. 2025 ("The Polar Express",
section 3) choose the coefficients in this way. Muon's usual coefficients leave singular values about 0.3 off, however often they are applied, and
need one iteration more to come that near.

X X^T and its square are symmetric: half of them is computed. So a polynomial of a square matrix costs two products.
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import numpy as np

from metalens.ops import Weight, gram, linear, symmetric_product, use_precision
from metalens.ops.backends import Precision
from metalens.utils.arrays import to_float

Quintic = tuple[float, float, float]

# The smallest singular value that the polynomials are made for, relative to 1 / sqrt(rows): all singular values of a matrix of Frobenius norm 1 have
# that size if they are equal. Held-out KL after 288 steps of 128 tokens on the demo model (256 rows): 0.7700, 0.7684, 0.7682, 0.7693 for 0.8, 0.32,
# 0.16, 0.05 with three iterations; 0.7679 for 0.16 with four; 0.7684 with four of Muon's usual iterations.
SMALLEST = 0.16
# Largest distance of a singular value from 1. On SmolLM2-135M-Instruct (576 rows, 80 steps of 128 tokens; layers 0, 11, 22) KL is 3.503, 2.513, 1.250
# with an iteration more, and 3.506, 2.519, 1.253 with this.
ERROR = 0.5
SLACK = 1.01  # rounded operands may raise a singular value above 1, where a polynomial is steep


def best_quintic(low: float, high: float) -> tuple[Quintic, float]:
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
def quintics(rows: int, iterations: int | None = None) -> tuple[tuple[Quintic, ...], float]:
    """Return the polynomials for matrices of a size, and the largest distance from 1 that they leave for singular values from SMALLEST on.

    Args:
        rows: the shorter side of the matrices, at least 1.
        iterations: number of polynomials. None = until the distance is at most ERROR: 3 for 59 to 1056 rows, 4 up to 19,097, then 5.
    """
    low, high, error = min(1.0, SMALLEST / math.sqrt(rows)), 1.0, math.inf
    found: list[Quintic] = []
    while len(found) < iterations if iterations is not None else error > ERROR:
        polynomial, error = best_quintic(low, high)
        found.append(polynomial)
        low, high = 1 - error, 1 + error
    return tuple(found), error


def orthogonalized(x: mx.array, iterations: int | None, precision: Precision) -> mx.array:
    """Return U V^T approximately, for x = U S V^T. Evaluated. A matrix of zeros stays zero.

    Args:
        x: matrix [rows, columns], float32.
        iterations: number of polynomials, as in `quintics`.
        precision: precision of the operands of products.
    """
    norm = mx.linalg.norm(x)
    if to_float(norm) == 0:  # the last layer of a lens, whose translator is exact as long as it is the identity
        return x
    wide = x.shape[0] <= x.shape[1]
    found = (x if wide else x.T) / (SLACK * norm)
    with use_precision(precision):
        for a, b, c in quintics(min(x.shape), iterations)[0]:
            squares = gram(found)
            found = a * found + linear(b * squares + c * symmetric_product(squares, squares), Weight(found), transpose=False)
            mx.eval(found)  # MLX on a CPU reserves memory for all arrays that are computed together
    return found if wide else found.T
