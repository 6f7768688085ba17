"""The search on the sphere, on functions whose maxima are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.analysis.sphere import maximize_on_sphere, unit, without

NOTHING = np.zeros((0, 12))


def run(search, function):
    """Run a search to its end; return its result and the points that it asked for."""
    points, point = [], next(search)
    try:
        while True:
            points.append(point)
            point = search.send(function(point))
    except StopIteration as end:
        return end.value, points


def quadratic(matrix):
    return lambda v: (float(v @ matrix @ v), 2 * matrix @ v)


@given(st.integers(0, 50), st.integers(2, 12))
def test_the_largest_eigenvector(seed, width):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((width, width))
    matrix = a @ a.T
    found, points = run(maximize_on_sphere(rng.standard_normal(width), np.zeros((0, width)), tolerance=1e-9, max_evaluations=400), quadratic(matrix))
    values, vectors = np.linalg.eigh(matrix)
    # A quadratic form on a sphere has no local maxima but the global ones.
    assert found.value == pytest.approx(values[-1], rel=1e-4)
    if values[-1] > 1.05 * values[-2]:
        assert abs(found.point @ vectors[:, -1]) > 0.99
    assert found.evaluations == len(points)
    np.testing.assert_allclose([np.linalg.norm(v) for v in points], 1, atol=1e-12)


def test_a_narrow_ridge_takes_few_evaluations(rng):
    # The curvature along the ridge is 1e-4 of that across it: steepest ascent is not there after 2000 evaluations.
    vectors = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    matrix = (vectors * np.append(np.linspace(-99, 1, 11), 1.01)) @ vectors.T
    found, _ = run(maximize_on_sphere(rng.standard_normal(12), NOTHING, tolerance=1e-10, max_evaluations=300), quadratic(matrix))
    assert found.converged
    assert found.evaluations < 60
    assert abs(found.point @ vectors[:, -1]) > 0.999


def test_the_complement_is_never_left(rng):
    vectors = np.linalg.qr(rng.standard_normal((12, 12)))[0].T
    matrix = (vectors.T * np.arange(12.0)) @ vectors
    basis = vectors[[11, 10]]  # the two largest are taken
    found, points = run(maximize_on_sphere(rng.standard_normal(12), basis, tolerance=1e-8, max_evaluations=300), quadratic(matrix))
    assert max(np.abs(basis @ v).max() for v in points) < 1e-12
    assert abs(found.point @ vectors[9]) > 0.999
    assert found.value == pytest.approx(9, rel=1e-4)


def test_the_limit_of_evaluations(rng):
    a = rng.standard_normal((12, 12))
    for limit in (1, 2, 7):
        found, points = run(maximize_on_sphere(rng.standard_normal(12), NOTHING, max_evaluations=limit, tolerance=0), quadratic(a @ a.T))
        assert len(points) == found.evaluations <= limit
        assert not found.converged
    assert found.value == max(v @ (a @ a.T) @ v for v in points)


def test_a_flat_function_ends_at_once(rng):
    found, points = run(maximize_on_sphere(rng.standard_normal(12), NOTHING), lambda v: (1.0, np.zeros(12)))
    assert found.converged
    assert len(points) == 1


def test_noise_in_the_values_ends_the_search(rng):
    """Rounding makes every step look like a fall: the search must not go on for ever, and must return what it has."""
    values = iter(np.linspace(1, 0, 1000))
    found, points = run(maximize_on_sphere(rng.standard_normal(12), NOTHING, max_evaluations=500), lambda v: (next(values), np.ones(12)))
    assert len(points) < 20
    assert found.value == 1.0
    np.testing.assert_array_equal(found.point, points[0])


def test_without_removes_large_parts_exactly(rng):
    basis = np.linalg.qr(rng.standard_normal((12, 3)))[0].T
    x = 1e8 * basis[0] + rng.standard_normal(12)
    assert np.abs(basis @ without(x, basis)).max() < 1e-14 * 1e8
    assert np.abs(basis @ unit(without(x, basis))).max() < 1e-14
