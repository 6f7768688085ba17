"""Test that every kind of defect is found with its line, and that the corrected kernel passes."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

import mslcpu
from mslcpu.support import needs_clang, run

pytestmark = needs_clang


@dataclasses.dataclass
class Defect:
    """A body that fails on its line 4 with a matching message, and one that passes."""

    name: str
    message: str
    wrong: str
    right: str
    threadgroup: int = 64
    line: int | None = 4


DEFECTS = [
    Defect("read beyond the end", "out-of-bounds device read of 4 bytes at byte 256 of buffer 'x' .256 bytes.*thread .63,0,0.",
           "out[i] = x[i + 1];", "out[i] = x[i];"),
    Defect("read before the start", "out-of-bounds device read of 4 bytes at byte -4 of buffer 'x'", "out[i] = x[int(i) - 1];", "out[i] = x[i];"),
    Defect("read far away", "out-of-bounds device read .* at byte 400000000 of buffer 'x'",
           "out[i] = x[i + 100000000];", "out[i] = x[i];"),
    Defect("vector across the end", "out-of-bounds device read of .* bytes at byte 260",
           "packed_float4 v = ((const device packed_float4*)(x + 62))[0]; out[i] = v[0] + v[3];",
           "packed_float4 v = ((const device packed_float4*)(x + 60))[0]; out[i] = v[0] + v[3];"),
    Defect("write beyond the end", "out-of-bounds device write of 4 bytes at byte 256 of buffer 'out'", "out[i + 1] = 0;", "out[i] = 0;"),
    Defect("write to an input", "write to input buffer 'x' .byte 0.", "((device float*)x)[i] = 0; out[i] = 0;", "out[i] = 0;"),
    Defect("read of an unwritten output", "read of uninitialized output: byte 0 of buffer 'out'", "out[i] += 1;", "out[i] = 1; out[i] += 1;"),
    Defect("threadgroup index", "array index 64 out of bounds",
           "threadgroup float s[64]; s[t + 1] = 0; out[i] = 0;", "threadgroup float s[64]; s[t] = 0; out[i] = 0;"),
    Defect("threadgroup pointer", "out-of-bounds threadgroup write of 4 bytes at byte 256 of 's' .256 bytes.",
           "threadgroup float s[64]; threadgroup float* p = s; p[t + 1] = 0; out[i] = 0;",
           "threadgroup float s[64]; threadgroup float* p = s; p[t] = 0; out[i] = 0;"),
    Defect("past one threadgroup array into the next", "out-of-bounds threadgroup read of 4 bytes at byte 256 of 'a'",
           "threadgroup float a[64], b[64]; a[t] = b[t] = 1; threadgroup float* p = a; out[i] = p[t + 64];",
           "threadgroup float a[64], b[64]; a[t] = b[t] = 1; threadgroup float* p = a; out[i] = p[t];"),
    Defect("far past a threadgroup array", "out-of-bounds threadgroup read of 4 bytes at byte 4096 of 'a'",
           "threadgroup float a[64], b[2048]; a[t] = b[t] = 1; threadgroup float* p = a; out[i] = p[t + 1024];",
           "threadgroup float a[64], b[2048]; a[t] = b[t] = 1; threadgroup float* p = b; out[i] = p[t];"),
    Defect("uninitialized threadgroup memory", "read of uninitialized threadgroup memory: byte 0 of 's'",
           "threadgroup float s[64]; out[i] = s[t];", "threadgroup float s[64]; s[t] = 1; out[i] = s[t];"),
    Defect("race by writing, then reading", "threadgroup data race .write-read, no barrier between.: byte .* of 's'",
           "threadgroup float s[64]; s[t] = 1; simdgroup_barrier(mem_flags::mem_none); out[i] = s[t ^ 1];",
           "threadgroup float s[64]; s[t] = 1; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[t ^ 1];"),
    Defect("race by reading, then writing", "threadgroup data race .read-write|threadgroup data race .write-read",
           "threadgroup float s[64]; s[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float v = s[t ^ 5]; s[t] = v; out[i] = v;",
           "threadgroup float s[64]; s[t] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float v = s[t ^ 5]; "
           "threadgroup_barrier(mem_flags::mem_threadgroup); s[t] = v; out[i] = v;"),
    Defect("race by writing twice", "threadgroup data race .write-write", "threadgroup float s[1]; s[0] = x[i]; out[i] = 0;",
           "threadgroup float s[1]; if (t == 0) { s[0] = x[i]; } out[i] = 0;"),
    Defect("race between simdgroups despite simdgroup barriers", "threadgroup data race",
           "threadgroup float s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); s[t] = 2; "
           "simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[t ^ 32];",
           "threadgroup float s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_threadgroup); s[t] = 2; "
           "simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[t ^ 31];"),
    Defect("barrier without threadgroup memory", "threadgroup data race .write-read",
           "threadgroup float s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_device); out[i] = s[63 - t];",
           "threadgroup float s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); out[i] = s[63 - t];"),
    Defect("race of bytes in a word", "threadgroup data race .write-read.*: byte [0-9]+ of 's'",
           "threadgroup uchar s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_none); out[i] = s[t ^ 1];",
           "threadgroup uchar s[64]; s[t] = 1; threadgroup_barrier(mem_flags::mem_none); out[i] = s[t];"),
    Defect("atomic against plain access", "threadgroup data race",
           "threadgroup atomic_uint n; atomic_store_explicit(&n, t, memory_order_relaxed); out[i] = float(*(threadgroup uint*)&n);",
           "threadgroup atomic_uint n; atomic_store_explicit(&n, t, memory_order_relaxed); "
           "out[i] = atomic_load_explicit(&n, memory_order_relaxed);"),
    Defect("different values to one output element", "device data race: threads .* store different values",
           "out[i / 2] = x[i];", "out[i / 2] = x[i / 2];"),
    Defect("different values from two threadgroups", "device data race: threads .* of another threadgroup and .* store different values",
           "out[t] = x[i];", "out[t] = x[t];", threadgroup=32),
    Defect("read of another thread's output", "device data race: thread .* reads byte .* of buffer 'out', which thread .* wrote",
           "out[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float v = out[i ^ 1]; "
           "threadgroup_barrier(mem_flags::mem_device); out[i] = v;",
           "out[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); float v = out[i ^ 1]; "
           "threadgroup_barrier(mem_flags::mem_device); out[i] = v;"),
    Defect("write of what another thread reads", "device data race: thread .* (writes|reads) byte .* of buffer 'out'",
           "out[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); float v = out[i ^ 1]; out[i] = v;",
           "out[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); float v = out[i ^ 1]; "
           "threadgroup_barrier(mem_flags::mem_device); out[i] = v;"),
    Defect("different barriers", "barrier divergence: threads wait at different barriers .lines [46] and [46].",
           "if (t < 32) { threadgroup_barrier(mem_flags::mem_none); }\n\nelse { threadgroup_barrier(mem_flags::mem_none); } out[i] = 0;",
           "threadgroup_barrier(mem_flags::mem_none); out[i] = 0;", line=None),
    Defect("return before a barrier", "barrier divergence: 40 threads reach the barrier at line 4, 24 have already returned",
           "if (t >= 40) return; threadgroup_barrier(mem_flags::mem_none); out[i] = 0;", "threadgroup_barrier(mem_flags::mem_none); out[i] = 0;"),
    Defect("part of a simdgroup at a collective", "divergence: simd collective reached by some lanes only .mask 0x7f.",
           "out[i] = 0; if (lane < 7) { out[i] = simd_sum(x[i]); }", "out[i] = 0; if (i < 32) { out[i] = simd_sum(x[i]); }"),
    Defect("part of a simdgroup at its barrier", "divergence: simdgroup_barrier reached by some lanes only",
           "if (lane < 7) { simdgroup_barrier(mem_flags::mem_none); } out[i] = 0;",
           "if (i < 32) { simdgroup_barrier(mem_flags::mem_none); } out[i] = 0;"),
    Defect("part of a simdgroup at a matrix product", "divergence: matrix multiplication reached by some lanes only",
           "simdgroup_matrix<float, 8, 8> m(1.0f); if (lane < 7) { simdgroup_multiply(m, m, m); } out[i] = 0;",
           "simdgroup_matrix<float, 8, 8> m(1.0f); simdgroup_multiply(m, m, m); out[i] = 0;"),
    Defect("part of a simdgroup at a matrix store", "divergence: simdgroup_load or simdgroup_store by some lanes only",
           "simdgroup_matrix<float, 8, 8> m(1.0f); if (lane < 7) { simdgroup_store(m, out, 8); }",
           "simdgroup_matrix<float, 8, 8> m(1.0f); if (i < 32) { simdgroup_store(m, out, 8); }"),
    Defect("too much threadgroup memory", "threadgroup memory limit: 32784 bytes with 's', at most 32768",
           "threadgroup float s[8193]; s[t] = 0; out[i] = 0;", "threadgroup float s[8192]; s[t] = 0; out[i] = 0;"),
    Defect("too much threadgroup memory together", "threadgroup memory limit: 32784 bytes with 'b', at most 32768",
           "threadgroup float a[8192]; threadgroup float b; a[t] = 0; b = 0; out[i] = 0;",
           "threadgroup float a[8188]; threadgroup float b; a[t] = 0; if (t == 0) { b = 0; } out[i] = 0;"),
    Defect("misaligned vector in device memory", "misaligned load: address .* is not a multiple of 16",
           "float4 v = *(const device float4*)(x + 1); out[i] = v.x + v.w;", "float4 v = *(const device float4*)(x + 4); out[i] = v.x + v.w;"),
    Defect("misaligned vector in threadgroup memory", "misaligned store: address .* is not a multiple of 8",
           "threadgroup half s[256]; *(threadgroup half4*)(s + 4 * (t % 32) + 1) = half4(0); out[i] = 0;",
           "threadgroup half s[256]; *(threadgroup half4*)(s + 4 * t) = half4(0); out[i] = 0;"),
    Defect("thread array", "array index 4 out of bounds.*thread .4,0,0.",
           "float a[4] = {0, 0, 0, 0}; a[t] = 1; out[i] = a[0];", "float a[4] = {0, 0, 0, 0}; a[t % 4] = 1; out[i] = a[0];"),
    Defect("constant table", "array index 3 out of bounds", "out[i] = table[t];", "out[i] = table[t % 3];"),
    Defect("division by zero", "integer division by zero", "out[i] = float(7 / int(t));", "out[i] = float(7 / int(t + 1));"),
    Defect("endless loop that computes", "kernel did not finish within 0.5 s", "while (x[0] == 0.0f) { } out[i] = 0;", "out[i] = 0;", line=None),
    Defect("endless loop that communicates", "kernel did not finish within 0.5 s",
           "while (simd_sum(x[0]) == 0.0f) { } out[i] = 0;", "out[i] = 0;", line=None),
    Defect("too much thread memory", "stack overflow", "volatile float a[200000]; for (int j = 0; j < 200000; j++) { a[j] = 0; } out[i] = a[t];",
           "volatile float a[2000]; for (int j = 0; j < 2000; j++) { a[j] = 0; } out[i] = a[t];", line=None),
]  # fmt: skip
HEADER = "constant float table[3] = {1, 2, 3};"


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defect_is_found(defect):
    where = f".*at test.source:{defect.line}" if defect.line else ""
    with mslcpu.options(timeout=0.5), pytest.raises(mslcpu.MslError, match=f"(?s)test: ({defect.message}).*{where}"):
        run(defect.wrong, threadgroup=defect.threadgroup, header=HEADER)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_corrected_twin_passes(defect):
    for schedule in mslcpu.SCHEDULES:
        with mslcpu.options(schedule=schedule):
            run(defect.right, threadgroup=defect.threadgroup, header=HEADER)


RACES = [d for d in DEFECTS if "data race" in d.message]


@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
@pytest.mark.parametrize("defect", RACES, ids=lambda d: d.name)
def test_races_are_found_in_every_schedule(defect, schedule):
    """A race is found in every order, whichever of the two accesses comes first."""
    for seed in range(3):
        with mslcpu.options(schedule=schedule, seed=seed), pytest.raises(mslcpu.MslError, match="data race|uninitialized"):
            run(defect.wrong, threadgroup=defect.threadgroup)


def test_limits_of_threads_and_buffers():
    with pytest.raises(mslcpu.MslError, match="threadgroup of 1025 threads, at most 1024"):
        run("out[i] = 0;", threads=1025)
    run("out[i] = 0;", threads=1024)
    for count in (30, 31):  # and the output makes one more
        inputs = {f"x{n:02}": mx.arange(8) for n in range(count)}
        if count == 31:
            with pytest.raises(mslcpu.MslError, match="at most 31 buffers"):
                run("out[i] = 0;", inputs)
        else:
            run("out[i] = 0;", inputs)


def test_same_value_from_several_threads_is_no_race():
    run("out[i / 4] = 1; out[16 + i * 3 / 4] = 2;", threads=64)


def test_early_return_and_partial_collectives_pass_when_lenient():
    with mslcpu.options(strict=False):
        run("if (t >= 40) return; threadgroup_barrier(mem_flags::mem_none); out[i] = 0;")


def test_lines_lead_through_inlined_functions():
    header = "namespace inner {\nMETAL_FUNC float get(const device float* p, uint i) {\n  return p[i + 1];\n}\n}"
    with pytest.raises(mslcpu.MslError, match=r"at test.header:3 <- test.source:4$"):
        run("out[i] = inner::get(x, i);", header=header)


def test_failures_leave_nothing_behind():
    for _ in range(3):
        with pytest.raises(mslcpu.MslError, match="out-of-bounds"):
            run("out[i + 1] = simd_sum(x[i]);")
        assert run("out[i] = simd_sum(x[i]);", threads=32).tolist() == [496] * 32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[i] = ((const device float*)8)[0];", "invalid memory access at address 0x8"),
        ("out[i] = float(7 / int(t));", "integer division by zero"),
        ("while (x[0] == 0.0f) { } out[i] = 0;", "kernel did not finish within 0.5 s"),
        ("if (t < 32) { threadgroup_barrier(mem_flags::mem_none); }\nelse { threadgroup_barrier(mem_flags::mem_none); }", "different barriers"),
    ],
)
def test_unchecked_kernels_fail_without_taking_the_process_along(body, message):
    with mslcpu.options(checked=False, timeout=0.5), pytest.raises(mslcpu.MslError, match=message):
        run(body)
    assert run("out[i] = 1;", threads=32).tolist() == [1] * 32


def test_traffic_is_counted():
    with mslcpu.recording() as reports:
        run("threadgroup half s[64]; s[t] = half(x[i / 2]); simd_sum(x[0]); threadgroup_barrier(mem_flags::mem_none); out[i] = s[t];")
    (report,) = reports
    assert report.buffers == {"x": mslcpu.Traffic(512, 0, 128, 0), "out": mslcpu.Traffic(0, 256, 0, 256)}
    assert (report.threadgroup_bytes, report.threadgroup_read, report.threadgroup_written) == (128, 128, 128)
    assert (report.barriers, report.simd_ops, report.matrix_ops, report.threads, report.threadgroups) == (1, 2, 0, 64, 1)
    assert report.seconds > 0
