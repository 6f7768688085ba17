"""Test launches with the errors that Metal allows: moved results of approximated functions, and flushed subnormal numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from mslcpu.support import needs_clang, run

pytestmark = needs_clang


def moves(expression: str, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return by how many units in the last place each result differs from that of an exact launch."""
    exact = np.array(run(f"out[i] = {expression};", {"x": x}, threads=x.size, threadgroup=64)).view(np.int32)
    with mslcpu.options(inexact=True, seed=seed):
        moved = np.array(run(f"out[i] = {expression};", {"x": x}, threads=x.size, threadgroup=64)).view(np.int32)
    return moved - exact


@pytest.mark.parametrize("function", ["exp", "precise::log", "metal::precise::tanh", "fast::exp2", "sin"])
def test_approximated_functions_move_by_up_to_four_units(rng, function):
    x = np.abs(rng.standard_normal(512)).astype(np.float32) + 0.01
    found = moves(f"{function}(x[i])", x)
    assert set(found) == set(range(-4, 5))
    assert np.array_equal(found, moves(f"{function}(x[i])", x)), "the same values move in the same way"
    assert not np.array_equal(found, moves(f"{function}(x[i])", x, seed=1))


@pytest.mark.parametrize(
    "expression",
    ["sqrt(x[i])", "precise::sqrt(x[i])", "1.0f / x[i]", "floor(x[i])", "fma(x[i], x[i], 1.0f)", "exp(-INFINITY) * x[i]", "exp(0.0f * x[i])"],
)
def test_exact_functions_stay(rng, expression):
    assert not moves(expression, np.abs(rng.standard_normal(64)).astype(np.float32)).any()


def test_subnormal_numbers_are_flushed_and_the_host_keeps_them():
    x = mx.array(np.array([1e-39, 1e-30, -1e-39, 1.0], np.float32))
    with mslcpu.options(inexact=True):
        assert run("out[i] = i == 1 ? x[i] * 1e-10f : x[i] * 1.5f;", {"x": x}, threads=4).tolist() == [0.0, 0.0, 0.0, 1.5]
        assert run("out[i] = float(as_type<half>(ushort(i)));", threads=4).tolist() == [0.0, *(n * 2.0**-24 for n in (1, 2, 3))]
    assert np.float32(1e-30) * np.float32(1e-10) > 0
    assert run("out[i] = x[i] * 1.0f;", {"x": x}, threads=4).tolist()[0] > 0


def test_unchecked_launches_are_exact():
    with mslcpu.options(checked=False):
        assert not moves("exp(x[i])", np.linspace(0, 1, 64, dtype=np.float32)).any()
