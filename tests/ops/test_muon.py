"""muon_direction against float64: momentum, scales, polynomials of the singular values, slopes, and the same bits for any number of threads."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import _ext, use_backend
from metalens.ops import muon_direction, use_precision
from support import oracle

# With values up to a few.
POLYNOMIALS = [(2.5, -2.0, 0.7), (2.0, -3.0, 2.0)]
# Wide, tall, square; on both sides of a tile, a task and a block of the reduction.
SHAPES = [(1, 1), (1, 7), (7, 1), (33, 17), (17, 257), (64, 64), (131, 131), (200, 300), (300, 40)]


def exact(gradient, momentum, beta, polynomials, slack=1.0, rows=None, columns=None):
    g, before = oracle.wide(gradient), oracle.wide(momentum)
    v = beta * before + (1 - beta) * g
    u = (1 - beta) * g + beta * v
    r = np.ones(len(g)) if rows is None else oracle.wide(rows)
    s = np.ones(g.shape[1]) if columns is None else oracle.wide(columns)
    x = r[:, None] * u / s
    left, values, right = np.linalg.svd(x / (slack * (np.linalg.norm(x) or 1)), full_matrices=False)
    for polynomial in polynomials:
        values = sum(c * values ** (2 * i + 1) for i, c in enumerate(polynomial))
    p = r[:, None] * ((left * values) @ right) / s
    return v, p, np.array([(g * p).sum(), (u * p).sum()])


def scales(rng, *shape):
    return [mx.array(np.exp(rng.standard_normal(n)).astype(np.float32)) for n in shape]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.usefixtures("cpu_backend")
def test_against_float64(rng, shape, scaled):
    g, v = oracle.random_array(rng, *shape, scale=1e-3), oracle.random_array(rng, *shape, scale=1e-3)
    rows, columns = scales(rng, *shape) if scaled else (None, None)
    found = muon_direction(g, v, 0.9, POLYNOMIALS, 1.01, rows, columns)
    momentum, direction, slopes = exact(g, v, 0.9, POLYNOMIALS, 1.01, rows, columns)
    assert {a.dtype for a in (found.momentum, found.direction, found.slopes)} == {mx.float32}
    np.testing.assert_allclose(oracle.wide(found.momentum), momentum, atol=1e-6 * np.abs(momentum).max())
    np.testing.assert_allclose(oracle.wide(found.direction), direction, atol=1.5e-5 * np.abs(direction).max())
    size = np.linalg.norm(oracle.wide(g)) * np.linalg.norm(direction)
    np.testing.assert_allclose(oracle.wide(found.slopes), slopes, atol=1e-5 * size)


@pytest.mark.parametrize("shape", [(64, 64), (40, 131), (131, 40)], ids=str)
@pytest.mark.usefixtures("native")
def test_no_less_exact_than_plain_mlx(rng, shape):
    g, v = oracle.random_array(rng, *shape), oracle.random_array(rng, *shape)
    expected = exact(g, v, 0.9, POLYNOMIALS)[1]
    ours = np.abs(oracle.wide(muon_direction(g, v, 0.9, POLYNOMIALS).direction) - expected).max()
    with use_backend("reference"):
        theirs = np.abs(oracle.wide(muon_direction(g, v, 0.9, POLYNOMIALS).direction) - expected).max()
    assert ours <= theirs + 1e-6 * np.abs(expected).max()


@pytest.mark.usefixtures("native")
def test_rounded_operands(rng):
    """Operands of 16 bits change the result by their rounding, and only where the CPU multiplies them faster."""
    g, v = oracle.random_array(rng, 131, 131), oracle.random_array(rng, 131, 131)
    with use_precision("bfloat16"):
        found = oracle.wide(muon_direction(g, v, 0.9, POLYNOMIALS).direction)
    error = np.abs(found - exact(g, v, 0.9, POLYNOMIALS)[1]).max()
    assert error < 0.02
    assert (error > 2e-5) == _ext.multiplies_bf16()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (0, 4), (4, 0)], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_nothing_stays_nothing(shape):
    found = muon_direction(mx.zeros(shape), mx.zeros(shape), 0.9, POLYNOMIALS)
    assert found.direction.shape == shape
    assert not any(mx.any(a).item() for a in (found.momentum, found.direction, found.slopes))


@pytest.mark.usefixtures("cpu_backend")
def test_what_is_not_finite_shows(rng):
    g = oracle.random_array(rng, 9, 9)
    g[3, 4] = float("nan")
    found = muon_direction(g, mx.zeros((9, 9)), 0.9, POLYNOMIALS)
    assert np.isnan(np.array(found.direction)).all()
    assert np.isnan(np.array(found.slopes)).all()


@pytest.mark.usefixtures("native")
def test_views_that_are_not_contiguous(rng):
    g, v = oracle.random_array(rng, 35, 40), oracle.random_array(rng, 35, 40)
    seen = muon_direction(mx.contiguous(g.T).T, v[::-1][::-1], 0.9, POLYNOMIALS)
    assert mx.array_equal(seen.direction, muon_direction(g, v, 0.9, POLYNOMIALS).direction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": mx.zeros((3,))}, "gradient must be a matrix"),
        ({"momentum": mx.zeros((3, 3))}, "momentum must be"),
        ({"polynomials": [(1.0, 2.0)]}, "3 coefficients, not 2"),
        ({"row_scale": mx.zeros((4,))}, "row_scale must be"),
        ({"column_scale": mx.zeros((3,))}, "column_scale must be"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    arguments = {"gradient": mx.zeros((3, 4)), "momentum": mx.zeros((3, 4)), "beta": 0.9, "polynomials": POLYNOMIALS, "slack": 1.0}
    with pytest.raises(ValueError, match=message):
        _ext.muon_direction(**arguments | changes)


SCRIPT = """
import mlx.core as mx, numpy as np
from support import oracle
from metalens import use_backend
from metalens.ops import muon_direction
rng = np.random.default_rng(0)
g, v = oracle.random_array(rng, 200, 389), oracle.random_array(rng, 200, 389)
with use_backend("native"):
    found = muon_direction(g, v, 0.9, [(2.5, -2.0, 0.7), (2.0, -3.0, 2.0)])
for a in (found.momentum, found.direction, found.slopes):
    print(mx.view(a, mx.uint32).astype(mx.int64).sum(), mx.view(a, mx.uint32).astype(mx.int64).max())
"""


def test_the_number_of_threads_changes_no_bit(run_python):
    assert len({run_python(SCRIPT, METALENS_NUM_THREADS=threads) for threads in ("1", "2", "5")}) == 1
