"""Test the counts of simdgroup instructions, cache lines and bank conflicts."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mslcpu
from mslcpu import Accesses
from mslcpu.support import needs_clang, run

pytestmark = needs_clang


def counted(body: str, threads: int = 32, **call: object) -> mslcpu.Report:
    with mslcpu.options(instructions=True), mslcpu.recording() as reports:
        run(body, threads=threads, **call)
    return reports[0]


def stores_to(index: str, element: str = "float", elements: int = 1024) -> Accesses:
    """Return the stores of one simdgroup to `s[index]`, from which one lane then reads."""
    return counted(f"threadgroup {element} s[{elements}]; s[{index}] = {element}(t); out[i] = 0;").threadgroup_stores


@pytest.mark.parametrize(
    ("index", "element", "expected"),
    [
        ("t", "float", Accesses({4: 1}, 0, 1, 0)),
        ("31 - t", "float", Accesses({4: 1}, 0, 1, 0)),  # a permutation
        ("2 * t", "float", Accesses({4: 1}, 0, 2, 1)),
        ("32 * t", "float", Accesses({4: 1}, 0, 32, 31)),
        ("33 * t % 1024", "float", Accesses({4: 1}, 0, 1, 0)),  # a padded column
        ("36 * (t / 4) + 8 * (t % 4)", "float", Accesses({4: 1}, 0, 4, 3)),  # rows of four units, padded by 16 bytes
        ("t", "half", Accesses({2: 1}, 0, 1, 0)),  # two lanes share a word
        ("64 * t % 1024", "half", Accesses({2: 1}, 0, 16, 15)),
        ("t", "float4", Accesses({16: 1}, 0, 4, 0)),  # 512 bytes take at least four cycles
        ("8 * t", "float4", Accesses({16: 1}, 0, 32, 28)),
    ],
)
def test_bank_conflicts(index, element, expected):
    if element == "half":  # neighbors in a word are no race, but lanes of one element are
        index = index.replace("64 * t % 1024", "64 * (t % 16) + t / 16")
    assert stores_to(index, element, 256 if element == "float4" else 1024 + 32) == expected


def test_lanes_that_read_one_word_share_a_cycle():
    report = counted("threadgroup float s[32]; s[t] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[t / 8] + s[5];")
    assert report.threadgroup_loads == Accesses({4: 2}, 0, 2, 0)


@pytest.mark.parametrize(
    ("element", "pitch", "transposed", "expected"),
    [
        ("float", 36, "false", Accesses({8: 1}, 0, 2, 0)),
        ("float", 32, "false", Accesses({8: 1}, 0, 8, 6)),
        ("float", 36, "true", Accesses({4: 2}, 0, 2, 0)),
        ("half", 40, "false", Accesses({4: 1}, 0, 1, 0)),
        ("half", 64, "false", Accesses({4: 1}, 0, 8, 7)),
        ("half", 40, "true", Accesses({2: 2}, 0, 2, 0)),
    ],
)
def test_fragments(element, pitch, transposed, expected):
    """A lane loads its two elements together, unless the matrix is transposed."""
    report = counted(
        f"threadgroup {element} s[8 * {pitch}]; for (uint j = t; j < 8 * {pitch}; j += 32) s[j] = 1;"
        "simdgroup_barrier(mem_flags::mem_threadgroup);"
        f"simdgroup_matrix<{element}, 8, 8> m; simdgroup_load(m, s, {pitch}, ulong2(0), {transposed});"
        "out[i] = m.thread_elements()[0] + m.thread_elements()[1];"
    )
    assert report.threadgroup_loads == expected


@pytest.mark.parametrize(
    ("index", "loads"),
    [
        ("x[i]", Accesses({4: 1}, 2)),
        ("x[16 * i]", Accesses({4: 1}, 32)),
        ("x[i + 8]", Accesses({4: 1}, 3)),
        ("x[5]", Accesses({4: 1}, 1)),
        ("((const device float4*)x)[i].y", Accesses({4: 1}, 8)),  # only the element that is used
        ("dot(((const device float4*)x)[i], float4(1))", Accesses({16: 1}, 8)),
        ("dot(float4(((const device packed_float4*)(x + 1))[i]), float4(1))", Accesses({16: 1}, 9)),  # aligned like one element
        ("dot(float2(((const device packed_half2*)x)[i]), float2(1))", Accesses({4: 1}, 2)),
        ("float(((const device uchar*)x)[i])", Accesses({1: 1}, 1)),
    ],
)
def test_lines_of_device_memory(index, loads):
    report = counted(f"out[i] = {index};", inputs={"x": mx.arange(1024, dtype=mx.float32)})
    assert report.buffers["x"].loads == loads
    assert report.buffers["out"].stores == Accesses({4: 1}, 2)
    assert report.buffers["x"].stores == report.buffers["out"].loads == Accesses()


def test_a_packed_vector_is_stored_at_once():
    report = counted("*(device packed_float4*)(out + 4 * t + 1) = packed_float4(float4(x[i]));", shape=(130,))
    assert report.buffers["out"].stores == Accesses({16: 1}, 9)


def test_one_instruction_that_reads_two_buffers():
    report = counted("const device float* p = t < 16 ? x : y; out[i] = p[t];", inputs={"x": mx.zeros(32), "y": mx.zeros(32)})
    assert report.buffers["x"].loads == Accesses({4: 1}, 1)
    assert report.buffers["y"].loads == Accesses({}, 1)


@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_lanes_that_leave_a_loop_early(schedule):
    """Pass n of every lane that is still in the loop is one instruction, and what follows the loop is one instruction of all lanes."""
    body = """float sum = 0;
    for (uint j = 0; j <= t % 4; j++) { sum += x[j * 32 + t]; }
    out[i] = sum + x[255];"""
    with mslcpu.options(schedule=schedule, seed=2):
        report = counted(body, threads=64, inputs={"x": mx.arange(256, dtype=mx.float32)})
    assert report.buffers["x"].loads.widths == {4: 2 * (4 + 1)}
    assert report.buffers["out"].stores == Accesses({4: 2}, 4)


def test_lanes_that_wait_elsewhere_are_not_counted():
    report = counted("out[i] = simd_sum(x[i]); if (t < 5) { out[i] = x[40 + i]; }", threads=64)
    assert report.buffers["x"].loads == Accesses({4: 3}, 5)


def test_nothing_is_counted_unless_asked():
    with mslcpu.recording() as reports:
        run("threadgroup float s[64]; s[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[63 - t];")
    assert reports[0].threadgroup_loads == reports[0].threadgroup_stores == reports[0].buffers["x"].loads == Accesses()
    assert reports[0].threadgroup_read == 256
