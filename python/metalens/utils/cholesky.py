"""Solve a symmetric positive definite system in float64, with the speed of products and on busy cores too.

LAPACK in NumPy's OpenBLAS factors a matrix with many short parallel parts. If other programs use the cores, each part waits for the slowest thread: a
matrix of 577 rows took 3.8 s in place of 0.02 s. Here LAPACK factors small blocks alone, and products do the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 96  # rows: OpenBLAS factors so few with one thread


def solve_positive_definite(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return X with matrix X = right, by one Cholesky factorization. Both arguments stay as they are.

    Args:
        matrix: symmetric and positive definite, [n, n]. Only its lower triangle is read.
        right: the right-hand sides, [n, m].

    Raises:
        numpy.linalg.LinAlgError: if the matrix is not positive definite.
    """
    lower, found = np.array(matrix), np.array(right)
    size = len(lower)
    starts = range(0, size, BLOCK)
    inverses = []
    for start in starts:
        block, below = slice(start, min(start + BLOCK, size)), slice(min(start + BLOCK, size), size)
        inverses.append(np.linalg.inv(np.linalg.cholesky(lower[block, block])))
        found[block] = inverses[-1] @ found[block]
        if below.start < size:
            lower[below, block] = lower[below, block] @ inverses[-1].T
            lower[below, below] -= lower[below, block] @ lower[below, block].T
            found[below] -= lower[below, block] @ found[block]
    for start, inverse in zip(reversed(starts), reversed(inverses), strict=True):
        block, below = slice(start, min(start + BLOCK, size)), slice(min(start + BLOCK, size), size)
        found[block] = inverse.T @ (found[block] - lower[below, block].T @ found[below])
    return found
