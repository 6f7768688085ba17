"""gram: values, symmetry to the last bit, batches, gradients, and the same bits for any number of threads."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import _ext, use_backend
from metalens.ops import gram, use_precision
from support import oracle

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
# One, one row and column more than a tile, more than one task on and below the diagonal; inner dimensions on both sides of a block.
SHAPES = [(1, 1), (2, 3), (33, 17), (17, 257), (193, 64), (389, 5)]

pytestmark = pytest.mark.usefixtures("native")


def assert_near(y, expected, terms, epsilon):
    assert y.shape == expected.shape
    assert (np.abs(oracle.wide(y) - expected) <= epsilon * np.abs(expected) + 2e-6 * terms + 4e-8).all()
    assert mx.array_equal(y, y.swapaxes(-1, -2))


@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_is_exact_up_to_one_rounding(rng, shape, dtype, lead):
    x = oracle.random_array(rng, *lead, *shape, dtype=dtype)
    y, w = gram(x), oracle.wide(x)
    assert y.dtype == dtype
    assert_near(y, w @ w.swapaxes(-1, -2), np.abs(w) @ np.abs(w).swapaxes(-1, -2), oracle.EPSILON[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_less_exact_than_plain_mlx(rng, dtype):
    x = oracle.random_array(rng, 67, 384, dtype=dtype)
    expected = oracle.wide(x) @ oracle.wide(x).T
    ours = np.abs(oracle.wide(gram(x)) - expected)
    with use_backend("reference"):
        theirs = np.abs(oracle.wide(gram(x)) - expected)
    assert (ours - oracle.EPSILON[dtype] * np.abs(expected)).max() <= theirs.max()


@pytest.mark.parametrize("view", [lambda a: mx.contiguous(a.swapaxes(-1, -2)).swapaxes(-1, -2), lambda a: a[:, ::-1][:, ::-1]])
def test_views_that_are_not_contiguous(rng, view):
    x = oracle.random_array(rng, 2, 35, 40)
    assert mx.array_equal(gram(view(x)), gram(x))


def test_an_empty_sum_is_zero():
    assert mx.array_equal(gram(mx.zeros((2, 3, 0))), mx.zeros((2, 3, 3)))
    assert gram(mx.zeros((2, 0, 3))).shape == (2, 0, 0)


def test_a_bad_row_spoils_its_row_and_column_only(rng):
    x = oracle.random_array(rng, 200, 9)
    x[70, 3] = float("nan")
    good = np.isfinite(oracle.wide(gram(x)))
    spoiled = np.zeros((200, 200), bool)
    spoiled[70] = spoiled[:, 70] = True
    assert (good == ~spoiled).all()


def test_reduced_precision_rounds_operands_only(rng):
    x = oracle.random_array(rng, 67, 300)
    rounded = oracle.wide(x.astype(mx.bfloat16)) if _ext.multiplies_bf16() else oracle.wide(x)
    with use_precision("bfloat16"):
        y = gram(x)
    assert_near(y, rounded @ rounded.T, np.abs(rounded) @ np.abs(rounded).T, 1e-6)


def test_gradient_is_that_of_plain_mlx(rng):
    x, c = oracle.random_array(rng, 2, 13, 9), oracle.random_array(rng, 2, 13, 13)
    ours = mx.grad(lambda x: (gram(x) * c).sum())(x)
    with use_backend("reference"):
        plain = mx.grad(lambda x: (gram(x) * c).sum())(x)
    assert mx.allclose(ours, plain, rtol=1e-5, atol=1e-5)


SCRIPT = """
import mlx.core as mx, numpy as np
from support import oracle
from metalens import use_backend
from metalens.ops import gram
x = oracle.random_array(np.random.default_rng(0), 2, 389, 300)
with use_backend("native"):
    print(mx.view(gram(x), mx.uint32).astype(mx.int64).sum(), mx.view(gram(x), mx.uint32).astype(mx.int64).max())
"""


def test_the_number_of_threads_changes_no_bit(run_python):
    assert len({run_python(SCRIPT, METALENS_NUM_THREADS=threads) for threads in ("1", "2", "5")}) == 1
