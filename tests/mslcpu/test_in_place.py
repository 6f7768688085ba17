"""Test launches in which an output takes an input's memory: the kernel has two pointers to one buffer."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mslcpu
from mslcpu.support import NAMES, needs_clang

pytestmark = needs_clang


def launch(body: str, x: mx.array, other: mx.array | None = None, shape: tuple[int, ...] | None = None, **options: object) -> mx.array:
    made = mslcpu.metal_kernel("test", ["y", "x"], ["out"], NAMES + body)
    with mslcpu.options(**options):
        (out,) = made(
            inputs=[mx.zeros(8) if other is None else other, x], output_shapes=[shape or x.shape], output_dtypes=[x.dtype],
            grid=(x.size, 1, 1), threadgroup=(min(x.size, 64), 1, 1), in_place={"out": "x"},
        )  # fmt: skip
    return out


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_a_thread_may_overwrite_what_it_has_read(schedule, checked):
    x = mx.arange(128, dtype=mx.float32)
    assert launch("float v = x[i]; out[i] = 3 * v;", x, schedule=schedule, checked=checked).tolist() == [3.0 * i for i in range(128)]
    assert x.tolist() == list(range(128)), "the caller's array stays"


@pytest.mark.parametrize("checked", [True, False])
def test_the_compiler_may_assume_that_the_buffers_do_not_overlap(checked):
    """So a kernel that reads an element again, after it has overwritten it, is found by its values."""
    x = mx.arange(64, dtype=mx.float32)
    assert launch("out[i] = x[i] + 1; out[i] += x[i];", x, checked=checked).tolist() == [2.0 * i + 1 for i in range(64)]


@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_another_threads_element_is_a_race(schedule):
    with pytest.raises(mslcpu.MslError, match="device data race"):
        launch("out[i] = x[i ^ 1];", mx.arange(64, dtype=mx.float32), schedule=schedule)


def test_the_pointers_are_equal_and_other_inputs_stay_inputs():
    assert launch("out[i] = x == out ? 1.0f : 0.0f;", mx.zeros(64)).tolist() == [1.0] * 64
    with pytest.raises(mslcpu.MslError, match="write to input buffer 'y'"):
        launch("((device float*)y)[i % 8] = 0; out[i] = 0;", mx.zeros(64))


def test_bounds_and_sizes():
    with pytest.raises(mslcpu.MslError, match="out-of-bounds device read of 4 bytes at byte 256"):
        launch("out[i] = x[i + 1];", mx.zeros(64), schedule="reverse")
    with pytest.raises(ValueError, match="'out' of 252 bytes cannot take the memory of 'x' .256 bytes"):
        launch("out[i] = 0;", mx.zeros(64), shape=(63,))


def test_other_math_modes_are_refused():
    mslcpu.metal_kernel("test", [], ["out"], "", compile_options={"math_mode": "safe"})
    with pytest.raises(ValueError, match="not 'fast'"):
        mslcpu.metal_kernel("test", [], ["out"], "", compile_options={"math_mode": "fast"})
