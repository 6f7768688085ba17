"""Delete barriers one by one: every deletion must be detected. Each kernel should have such a test of its tests."""

from __future__ import annotations

import pytest

import mslcpu
from mslcpu.support import MATMUL, REDUCTION, matmul, needs_clang, reduction

CODE = """
a(); threadgroup_barrier(mem_flags::mem_threadgroup);
// threadgroup_barrier(mem_flags::mem_none);
if (x) { metal::simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device); }
/* simdgroup_barrier(mem_flags::mem_none); */ b();
"""


def test_barriers_are_counted_and_removed():
    assert mslcpu.count_barriers(CODE) == 2
    assert mslcpu.without_barrier(CODE, 0) == CODE.replace("a(); threadgroup_barrier(mem_flags::mem_threadgroup);", "a(); ;")
    assert "if (x) { ; }" in mslcpu.without_barrier(CODE, 1)
    with pytest.raises(IndexError):
        mslcpu.without_barrier(CODE, 2)


@needs_clang
@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
@pytest.mark.parametrize("index", range(mslcpu.count_barriers(REDUCTION)))
def test_reduction_without_a_barrier(index, schedule):
    with mslcpu.options(schedule=schedule), pytest.raises(mslcpu.MslError, match="data race|uninitialized"):
        reduction(mslcpu.without_barrier(REDUCTION, index))


@needs_clang
@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
@pytest.mark.parametrize("index", range(mslcpu.count_barriers(MATMUL)))
def test_matmul_without_a_barrier(index, schedule):
    with mslcpu.options(schedule=schedule), pytest.raises(mslcpu.MslError, match="data race|uninitialized"):
        matmul(32, 32, 64, header=mslcpu.without_barrier(MATMUL, index))
