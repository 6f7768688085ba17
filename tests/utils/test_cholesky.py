"""The solution of positive definite systems, by blocks of every width, against what it was made from."""

import numpy as np
import pytest

from metalens.utils.cholesky import BLOCK, solve_positive_definite


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 17])
@pytest.mark.parametrize("columns", [1, 5])
def test_the_solution_is_found(rng, size, columns):
    rows = rng.standard_normal((2 * size, size)) * np.exp(rng.standard_normal(size))  # columns of uneven scale
    matrix, found = rows.T @ rows, rng.standard_normal((size, columns))
    right = matrix @ found
    kept = matrix.copy(), right.copy()
    np.testing.assert_allclose(solve_positive_definite(matrix, right), found, rtol=1e-7, atol=1e-7)
    assert np.array_equal(matrix, kept[0])
    assert np.array_equal(right, kept[1])


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 16])
def test_what_is_not_positive_definite_is_refused(rng, at):
    rows = rng.standard_normal((600, 2 * BLOCK + 17))
    matrix = rows.T @ rows
    matrix[at, at] = -1.0
    with pytest.raises(np.linalg.LinAlgError):
        solve_positive_definite(matrix, np.eye(len(matrix)))
