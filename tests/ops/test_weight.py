"""Rows and columns of packed matrices, unpacked alone."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Weight
from metalens.ops.weight import unpacked_columns, unpacked_rows
from support import oracle

PACKED = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)]
MODES = ["mxfp4", "mxfp8", "nvfp4"]


def weights(rng):
    for bits, group in PACKED:
        yield oracle.random_weight(rng, 6, 256, bits, group)
    for mode in MODES:
        yield oracle.random_float_weight(rng, 6, 256, mode)
    yield oracle.random_weight(rng, 6, 256, 4, 64, dtype=mx.bfloat16)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        yield Weight(oracle.random_array(rng, 6, 37, dtype=dtype))


def test_columns_of_every_format(rng):
    for w in weights(rng):
        expected, size = oracle.matrix_and_magnitude(w)
        inputs = w.shape[1]
        for start, stop in [(0, inputs), (0, 1), (inputs - 1, inputs), (5, 34), (31, min(129, inputs))]:
            found = unpacked_columns(w, start, stop)
            assert (found.dtype, found.shape) == (mx.float32, (stop - start, 6))
            difference = np.abs(oracle.wide(found) - expected.T[start:stop])
            assert (difference <= 1e-6 * size.T[start:stop]).all(), (w.mode, w.bits, w.group_size, start, stop)


def test_rows_of_every_format(rng):
    for w in weights(rng):
        expected, size = oracle.matrix_and_magnitude(w)
        ids = [5, 0, 5, 3]
        found = unpacked_rows(w, mx.array(ids))
        assert found.dtype == mx.float32
        assert (np.abs(oracle.wide(found) - expected[ids]) <= 1e-6 * size[ids]).all()


@pytest.mark.parametrize("group", [32, 64])
def test_only_the_groups_of_the_columns_are_unpacked(rng, group, monkeypatch):
    w = oracle.random_weight(rng, 6, 256, 4, group)
    shapes = []
    dequantize = mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda values, *a, **k: shapes.append(values.shape) or dequantize(values, *a, **k))
    unpacked_columns(w, 70, 90)
    assert shapes == [(6, 32 // 8 if group == 32 else 64 // 8)]
