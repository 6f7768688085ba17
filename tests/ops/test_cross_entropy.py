"""lens_ce against float64, for every kind of head."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import lens_ce, lens_stats
from support import oracle

SHAPES = [(1, 1, 3, 64), (2, 5, 131, 32), (3, 67, 257, 96)]  # L, N, V, D


def in_float64(n, labels, head):
    z = oracle.head_logits(oracle.wide(n), head)
    ce = -np.take_along_axis(oracle.log_softmax(z), np.broadcast_to(labels[None, :, None], (*z.shape[:2], 1)), axis=-1)[..., 0]
    difference = oracle.softmax(z)
    difference[:, np.arange(len(labels)), labels] -= 1
    if head.softcap is not None:
        difference = difference * (1 - (oracle.capped_logits(oracle.wide(n), head) / head.softcap) ** 2)
    return ce, head.scale * difference @ oracle.matrix(head.weight)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", oracle.HEADS)
def test_against_float64(rng, shape, kind):
    layers, tokens, vocab, d = shape
    options = dict(oracle.HEADS[kind])
    if options.get("padding", 0) >= vocab:
        options["padding"] = 1
    head = oracle.make_head(rng, vocab, d, **options)
    n, labels = oracle.random_array(rng, layers, tokens, d), rng.integers(0, head.tokens, tokens)
    ce, gradient = lens_ce(n, mx.array(labels), head)
    expected, of_n = in_float64(n, labels, head)
    assert ce.dtype == gradient.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(ce), expected, rtol=1e-5, atol=1e-4)
    assert oracle.row_errors(gradient, of_n).max() < 1e-3
    nll = lens_stats(n, head, 1, labels=mx.array(labels)).nll
    np.testing.assert_allclose(oracle.wide(ce), oracle.wide(nll), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32])
@pytest.mark.parametrize("padding", [0, 1])
def test_labels_that_are_no_token(rng, padding, dtype):
    """A padding row, ids outside the matrix: NaN as in lens_stats, and the other rows are as without them."""
    head = oracle.make_head(rng, 9, 32, padding=padding)
    n, labels = oracle.random_array(rng, 2, 5, 32), [3, head.tokens, 0, -1 if dtype != mx.uint32 else 9, 1 << 20]
    ce, gradient = lens_ce(n, mx.array(labels, dtype), head)
    expected, of_n = in_float64(n[:, [0, 2]], np.array([3, 0]), head)
    np.testing.assert_allclose(oracle.wide(ce)[:, [0, 2]], expected, rtol=1e-5, atol=1e-4)
    assert oracle.row_errors(gradient[:, [0, 2]], of_n).max() < 1e-3
    assert np.isnan(np.array(ce)[:, [1, 3, 4]]).all()
    assert np.isnan(np.array(gradient)[:, [1, 3, 4]]).all()
    nll = lens_stats(n, head, 1, labels=mx.array(labels, dtype)).nll
    np.testing.assert_array_equal(np.isnan(np.array(nll)), np.isnan(np.array(ce)))


def test_no_rows_and_wrong_shapes(rng):
    head = oracle.make_head(rng, 9, 32)
    ce, gradient = lens_ce(mx.zeros((2, 0, 32)), mx.zeros((0,), mx.int32), head)
    assert (ce.shape, gradient.shape) == ((2, 0), (2, 0, 32))
    for n, labels in (
        (mx.zeros((2, 3, 16)), mx.zeros((3,), mx.int32)),
        (mx.zeros((2, 3, 32)), mx.zeros((2,), mx.int32)),
        (mx.zeros((3, 32)), mx.zeros((3,), mx.int32)),
    ):
        with pytest.raises(ValueError, match="lens_ce needs n"):
            lens_ce(n, labels, head)
