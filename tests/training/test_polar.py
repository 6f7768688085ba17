"""The orthogonal factor by products: the best polynomials, and matrices against their singular value decomposition in float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.ops import muon_direction, use_precision
from metalens.training.polar import ERROR, SLACK, SMALLEST, best_polynomial, polynomials
from support import oracle


def value(polynomial, s):
    return sum(c * s ** (2 * i + 1) for i, c in enumerate(polynomial))


def composed(chain, s):
    for polynomial in chain:
        s = value(polynomial, s)
    return s


def orthogonalized(x, iterations, precision):
    """The direction that `muon_direction` takes on x alone, without momentum and scales."""
    with use_precision(precision):
        return muon_direction(x, x, 0.0, polynomials(min(x.shape), iterations)[0], SLACK).direction


def exact(x, chain):
    """What `orthogonalized` should return, by singular values."""
    u, s, v = np.linalg.svd(oracle.wide(x), full_matrices=False)
    return (u * composed(chain, s / (SLACK * np.linalg.norm(s)))) @ v


@given(st.floats(1e-6, 0.998), st.floats(0.1, 10))
def test_the_error_of_the_best_quintic_alternates(share, high):
    """Four extrema of equal size and alternating sign: no other quintic can be nearer to 1 everywhere (Chebyshev)."""
    low = share * high
    (a, b, c), error = best_polynomial(low, high)
    root = np.sqrt(9 * b * b - 20 * a * c)
    points = np.array([low, np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c)), high])
    assert (np.diff(points) > 0).all()
    np.testing.assert_allclose(value((a, b, c), points) - 1, [-error, error, -error, error], rtol=1e-4, atol=1e-12)
    assert np.abs(value((a, b, c), np.linspace(low, high, 1000)) - 1).max() <= error * (1 + 1e-6) + 1e-12


@given(st.floats(0.999, 1.0), st.floats(0.1, 10))
def test_where_the_interval_is_all_but_a_point(share, high):
    polynomial, error = best_polynomial(share * high, high)
    distance = np.abs(value(polynomial, np.linspace(share * high, high, 100)) - 1).max()
    assert distance <= 1.01 * error + 1e-14
    assert distance < 1e-8


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 299, 320, 4096, 50_000])
def test_as_many_iterations_as_the_matrix_asks_for(rows):
    chain, error = polynomials(rows)
    s = np.linspace(min(1, SMALLEST / np.sqrt(rows)), 1, 10_001)
    assert np.abs(composed(chain, s) - 1).max() == pytest.approx(error, rel=1e-3)
    assert error <= ERROR
    if len(chain) > 1:
        fewer, worse = polynomials(rows, len(chain) - 1)
        assert fewer == chain[:-1]
        assert worse > ERROR
    assert (np.diff(composed(chain, np.linspace(0, s[0], 1000))) > 0).all()  # what is smaller grows too, and does not jump


@pytest.mark.parametrize("rows", [64, 256, 576, 640, 4096])
def test_a_singular_value_that_rounding_raises_above_1_stays_near_1(rows):
    """A gradient of nearly one direction has a singular value of all but 1, and operands of 16 bits move it by up to 2^-7."""
    chain, _ = polynomials(rows)
    assert np.abs(composed(chain, np.linspace(1, 1 + 2**-7, 1000) / SLACK) - 1).max() <= ERROR


@pytest.mark.parametrize(("rows", "iterations"), [(58, 2), (59, 3), (1056, 3), (1057, 4), (19_000, 4), (19_200, 5)])
def test_the_numbers_that_the_documentation_gives(rows, iterations):
    assert len(polynomials(rows)[0]) == iterations


def test_an_iteration_less_than_muon_s_usual_polynomial():
    s = np.linspace(SMALLEST / np.sqrt(256), 1, 10_001)
    usual = (3.4445, -4.7750, 2.0315)
    distance = [np.abs(composed([usual] * n, s) - 1).max() for n in (3, 4)]
    assert distance[0] > 0.59
    assert polynomials(256, 3)[1] < distance[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 64), (64, 7), (31, 31), (64, 64), (97, 130)], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_matrices_are_their_singular_vectors(rng, shape):
    x = oracle.random_array(rng, *shape, scale=1e-6)
    for iterations in (1, 3, None):
        found = oracle.wide(orthogonalized(x, iterations, "float32"))
        np.testing.assert_allclose(found, exact(x, polynomials(min(shape), iterations)[0]), atol=2e-5)


@pytest.mark.parametrize("shape", [(64, 64), (7, 64), (64, 7), (130, 130)], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_rounded_operands_change_little(rng, shape):
    """Against an error of up to 0.3 that the polynomials leave."""
    x = oracle.random_array(rng, *shape)
    found = oracle.wide(orthogonalized(x, None, "bfloat16"))
    assert np.linalg.norm(found - exact(x, polynomials(min(shape))[0]), 2) < 0.06


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.usefixtures("cpu_backend")
def test_few_singular_values_are_1_too(rng, rank, precision):
    """A matrix of rank one has the largest singular value there can be."""
    x = mx.array((rng.standard_normal((50, rank)) @ rng.standard_normal((rank, 40))).astype(np.float32))
    found = np.linalg.svd(oracle.wide(orthogonalized(x, None, precision)), compute_uv=False)
    assert np.abs(found[:rank] - 1).max() < ERROR + 0.02
    assert found[rank:].max() < (1e-4 if precision == "float32" else 0.1)


def test_nothing_stays_nothing():
    assert not mx.any(orthogonalized(mx.zeros((5, 3)), None, "float32"))
