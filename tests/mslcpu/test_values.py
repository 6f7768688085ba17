"""Test that correct kernels give correct values."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from mslcpu.support import matmul, needs_clang, reduction, run, values

pytestmark = needs_clang

FLOATS = [mx.float32, mx.float16, mx.bfloat16]


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_template_for_each_type(dtype, checked):
    x = mx.random.normal((100,), key=mx.random.key(0)).astype(dtype)
    with mslcpu.options(checked=checked):
        out = run("out[i] = T(exp(float(x[i])) * scale);", {"x": x, "scale": 2.0}, 100, 32, dtype=dtype, template=[("T", dtype)])
    expected = 2 * mx.exp(x.astype(mx.float32))
    np.testing.assert_allclose(values(out), values(expected), rtol={mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype])


def test_template_arguments():
    body = "if constexpr (twice) { out[i] = T(x[i] * n * 2); } else { out[i] = T(x[i] * n); }"
    for twice in (False, True):
        out = run(body, dtype=mx.float16, template=[("T", mx.float16), ("n", 3), ("twice", twice)])
        assert mx.array_equal(out, (mx.arange(64) * (6 if twice else 3)).astype(mx.float16))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("exp(v)", np.exp), ("exp2(v)", np.exp2), ("log(v)", np.log), ("log2(v)", np.log2), ("sqrt(v)", np.sqrt), ("tanh(v)", np.tanh),
        ("rsqrt(v)", lambda v: 1 / np.sqrt(v)), ("precise::exp(v)", np.exp), ("fast::log(v)", np.log), ("sin(v)", np.sin),
        ("fma(v, v, 1.0f)", lambda v: v * v + 1), ("min(v, 2.0f)", lambda v: np.minimum(v, 2)), ("clamp(v, 1.0f, 2.0f)", lambda v: np.clip(v, 1, 2)),
        ("select(v, -v, v > 2.0f)", lambda v: np.where(v > 2, -v, v)), ("abs(-v)", np.abs), ("floor(v)", np.floor), ("rint(v)", np.rint),
        ("pow(v, 1.5f)", lambda v: v**1.5), ("isnan(v - v) ? 1.0f : 0.0f", lambda v: 0 * v), ("isinf(v / 0.0f) ? 1.0f : 0.0f", lambda v: 0 * v + 1),
        ("float(half(v))", lambda v: v.astype(np.float16)), ("float(as_type<uint>(v) >> 16)", lambda v: v.view(np.uint32) >> 16),
        ("0.5 * v", lambda v: v / 2), ("max(fract(v), 0.25f)", lambda v: np.maximum(v - np.floor(v), 0.25)),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_float_functions(expression, expected):
    x = np.linspace(0.1, 5, 64, dtype=np.float32)
    out = run(f"float v = x[i]; out[i] = {expression};", {"x": x})
    np.testing.assert_allclose(values(out), expected(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("popcount(v)", lambda v: v.bit_count()), ("ctz(v)", lambda v: (v & -v).bit_length() - 1 if v else 32),
        ("clz(v)", lambda v: 32 - v.bit_length()),
        ("extract_bits(v, 2, 3)", lambda v: v >> 2 & 7), ("mulhi(v * 65537u, 65536u * 3u)", lambda v: (v * 65537 % 2**32) * 65536 * 3 >> 32),
        ("uint(ushort(v * 40000u))", lambda v: v * 40000 % 65536), ("v << 2", lambda v: v << 2), ("max(v, 7u)", lambda v: max(v, 7)),
        ("uint(long(v) * 5000000000l >> 16)", lambda v: (v * 5000000000 >> 16) % 2**32), ("uint(popcount(uchar(v)))", lambda v: v.bit_count()),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_integer_functions(expression, expected):
    out = run(f"uint v = i; out[i] = {expression};", dtype=mx.uint32)
    assert out.tolist() == [expected(v) for v in range(64)]


def test_half_rounds_after_every_operation():
    """2048 + 1 is not a half. If intermediate values stayed float, the sum would be larger by one."""
    out = run("half a = half(x[i]); out[i] = a + half(1.0f) + half(1.0f);", {"x": np.full(64, 2048, np.float32)}, dtype=mx.float16)
    assert out.tolist() == [2048.0] * 64


def test_bfloat_conversions_round_to_nearest_even():
    x = mx.random.normal((1024,), key=mx.random.key(1))
    out = run("bfloat b = bfloat(x[i]); out[i] = b;", {"x": x}, 1024, dtype=mx.bfloat16)
    assert mx.array_equal(out, x.astype(mx.bfloat16))
    exact = np.array(x).view(np.uint32).astype(np.uint64)
    rounded = ((exact + 0x7FFF + (exact >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(np.array(out.view(mx.uint16)), rounded)


def test_conversions_between_half_and_bfloat():
    out = run("bfloat b = bfloat(half(x[i])); half h = half(b) + static_cast<half>(b); out[i] = h;", dtype=mx.float16)
    assert out.tolist() == [2.0 * n for n in range(64)]


def test_vectors():
    body = """
    float4 v = float4(x[i], float2(1, 2), 3);
    half4 h = half4(v.xyzw);
    uchar4 bytes = as_type<uchar4>(i * 0x01010101u);
    uint2 pair = uint2(i, 7);
    v.xy += 1;
    bool4 big = v > 2;
    out[i] = dot(v, float4(1)) + float(h.w) + float(bytes.z) + float(pair.y)
      + (any(big) ? 0.5f : 0.0f) + vec<float, 2>(x[i]).y + metal::float3(1, 2, 3).z;
    """
    n = np.arange(64)
    np.testing.assert_allclose(values(run(body)), (n + 1 + 2 + 2 + 3) + 3 + n + 7 + 0.5 + n + 3)


def test_program_scope_constants_and_structs():
    header = """
    constant float table[4] = {10, 20, 30, 40};
    constexpr constant int STEP = 2;
    constexpr int twice(int n) { return 2 * n; }
    template <typename T> struct Reader {
      static constexpr constant int width = twice(STEP);
      T bias;
      Reader(T b) thread : bias(b) {}
      T get(const device T* p, uint i) const { return p[i] + bias + T(table[i % width]); }
    };
    """
    out = run("out[i] = Reader<float>(0.5f).get(x, i);", header=header)
    assert out.tolist() == [n + 0.5 + 10 * (n % 4 + 1) for n in range(64)]


def test_pointer_casts():
    body = """
    threadgroup float shared[64];
    threadgroup half* halves = reinterpret_cast<threadgroup half*>(shared);
    halves[t] = half(reinterpret_cast<const device uint*>(x)[i] >> 23);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = float(halves[63 - t]);
    """
    x = np.arange(64, dtype=np.float32)
    assert np.array_equal(values(run(body)), (x.view(np.uint32) >> 23)[::-1].astype(np.float32))


LANES = np.arange(64)
IN_GROUP = LANES % 32


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_sum(x[i])", np.repeat([496, 1520], 32)), ("simd_max(x[i])", np.repeat([31, 63], 32)), ("simd_min(x[i])", np.repeat([0, 32], 32)),
        ("simd_product(lane < 4 ? x[i] + 1 : 1.0f)", np.repeat([24, 33 * 34 * 35 * 36], 32)),
        ("simd_and(i | 1u)", np.repeat([1, 33], 32)), ("simd_or(i)", np.repeat([31, 63], 32)), ("simd_xor(lane == 3 ? 5u : 0u)", np.full(64, 5)),
        ("simd_broadcast(x[i], 5)", np.repeat([5, 37], 32)), ("simd_broadcast_first(x[i])", np.repeat([0, 32], 32)),
        ("simd_shuffle(x[i], ushort(31 - lane))", LANES - IN_GROUP + 31 - IN_GROUP), ("simd_shuffle_xor(x[i], 3)", LANES ^ 3),
        ("simd_shuffle_down(x[i], 4)", np.where(IN_GROUP < 28, LANES + 4, LANES)),
        ("simd_shuffle_up(x[i], 4)", np.where(IN_GROUP >= 4, LANES - 4, LANES)),
        ("simd_shuffle_rotate_down(x[i], 4)", LANES - IN_GROUP + (IN_GROUP + 4) % 32),
        ("simd_shuffle_and_fill_up(x[i], -x[i], 4)", np.where(IN_GROUP >= 4, LANES - 4, -(LANES + 28))),
        ("simd_prefix_inclusive_sum(lane)", IN_GROUP * (IN_GROUP + 1) // 2), ("simd_prefix_exclusive_sum(1.0f)", IN_GROUP),
        ("simd_any(lane == 9) ? 1 : 0", np.ones(64)), ("simd_all(lane < 9) ? 1 : 0", np.zeros(64)),
        ("float(uint(simd_vote::vote_t(simd_ballot(lane == 1 || lane == 3))))", np.full(64, 10)),
        ("simd_ballot(true).all() ? 1 : 0", np.ones(64)),
        ("simd_is_first() ? 1 : 0", IN_GROUP == 0), ("quad_sum(x[i])", LANES // 4 * 16 + 6), ("quad_shuffle_xor(x[i], 1)", LANES ^ 1),
        ("quad_broadcast(x[i], 2)", LANES // 4 * 4 + 2), ("simd_sum(half(1.0f))", np.full(64, 32)),
        ("simd_max(bfloat(x[i]))", np.repeat([31, 63], 32)),
        ("simd_sum(float2(1, 2)).y", np.full(64, 64)),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("checked", [True, False])
def test_simdgroup_collectives(expression, expected, checked):
    with mslcpu.options(checked=checked):
        assert np.array_equal(values(run(f"out[i] = float({expression});")), expected)


def test_collectives_of_part_of_a_simdgroup():
    """Metal defines them for the active threads; strict mode rejects them as probable mistakes."""
    with mslcpu.options(strict=False):
        out = run("out[i] = -1; if (lane < 5) { out[i] = simd_sum(1.0f); } else if (lane < 7) { out[i] = simd_sum(x[i]); }")
    assert out.tolist()[:8] == [5, 5, 5, 5, 5, 11, 11, -1]


def test_incomplete_last_simdgroup():
    assert run("out[i] = simd_sum(1.0f);", threads=40).tolist() == [32] * 32 + [8] * 8


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("space", ["device", "threadgroup"])
def test_matrices(dtype, space):
    """D = A B^T + C with rows of 12, loaded from and stored to either memory, and stored transposed."""
    rng = np.random.default_rng(0)
    a, b, c = (mx.array(rng.integers(-4, 5, (8, 12)).astype(np.float32)).astype(dtype) for _ in range(3))
    memory = "const device T* pa = a; const device T* pb = b;"
    if space == "threadgroup":
        memory = """threadgroup T pa[96]; threadgroup T pb[96];
        for (uint j = lane; j < 96; j += 32) { pa[j] = a[j]; pb[j] = b[j]; }
        simdgroup_barrier(mem_flags::mem_threadgroup);"""
    body = f"""{memory}
    simdgroup_matrix<T, 8, 8> ma, mb; simdgroup_matrix<float, 8, 8> md, mc(0.0f);
    simdgroup_load(ma, pa, 12);
    simdgroup_load(mb, pb, 12, ulong2(2, 0), true);
    for (int j = 0; j < 2; j++) {{
      uint row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
      mc.thread_elements()[j] = float(c[row * 12 + column + j]);
    }}
    simdgroup_multiply_accumulate(md, ma, mb, mc);
    simdgroup_store(md, out, 8);
    simdgroup_store(md, out + 64, 8, 0, true);"""
    out = values(run(body, {"a": a, "b": b, "c": c}, 32, shape=(2, 8, 8), template=[("T", dtype)]))
    expected = values(a)[:, :8] @ values(b)[:, 2:10].T + values(c)[:, :8]
    assert np.array_equal(out[0], expected)
    assert np.array_equal(out[1], expected.T)


def test_diagonal_matrix():
    out = run("simdgroup_matrix<float, 8, 8> m(3.0f), p; simdgroup_multiply(p, m, m); simdgroup_store(p, out, 8);", threads=32, shape=(8, 8))
    assert np.array_equal(values(out), 9 * np.eye(8))


@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiled_matmul(dtype, schedule):
    with mslcpu.options(schedule=schedule), mslcpu.recording() as reports:
        out, expected = matmul(50, 64, 96, dtype)
    tolerance = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max())
    (report,) = reports
    assert report.matrix_ops == 64 * 64 * 96 // 512
    assert report.threadgroup_bytes == 4096
    assert report.buffers["w"].unique_read == 64 * 96 // 2
    assert report.buffers["w"].read == 2 * report.buffers["w"].unique_read  # once for each row of tiles
    assert report.buffers["out"].unique_written == report.buffers["out"].written == 50 * 64 * dtype.size
    assert report.barriers == 4 * (3 * 2 + 2)


@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_reduction(schedule):
    with mslcpu.options(schedule=schedule):
        assert mx.array_equal(*reduction())


def test_atomics():
    body = "atomic_fetch_add_explicit(&out[i % 4], x[i], memory_order_relaxed); atomic_fetch_max_explicit(&out[4], x[i], memory_order_relaxed);"
    out = run(body, shape=(5,), kernel={"atomic_outputs": True}, init_value=0, threadgroup=16)
    assert out.tolist() == [sum(range(r, 64, 4)) for r in range(4)] + [63]


def test_threadgroup_atomics():
    body = """threadgroup atomic_uint count;
    if (t == 0) { atomic_store_explicit(&count, 0u, memory_order_relaxed); }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&count, i, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = float(atomic_load_explicit(&count, memory_order_relaxed));"""
    assert run(body).tolist() == [64 * 63 / 2] * 64


def test_initial_value():
    assert run("if (i % 2 == 0) out[i] += 1;", init_value=2.5).tolist() == [3.5, 2.5] * 32
    assert run("if (i % 2 == 0) out[i] = bfloat(1.0f);", init_value=2.5, dtype=mx.bfloat16).tolist() == [1, 2.5] * 32


def test_unwritten_outputs_are_nan():
    out = run("if (i == 0) out[i] = 1;").tolist()
    assert out[0] == 1
    assert all(math.isnan(v) for v in out[1:])


@pytest.mark.parametrize("kind", ["transposed", "stepped", "reversed", "broadcast", "bfloat"])
def test_strided_inputs(kind):
    a = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    view = {
        "transposed": a.T, "stepped": a[:, ::2], "reversed": a[::-1], "broadcast": mx.broadcast_to(a[:1], (4, 6)), "bfloat": a.astype(mx.bfloat16).T,
    }[kind]  # fmt: skip
    body = "out[thread_position_in_grid.x] = x[elem_to_loc(thread_position_in_grid.x, x_shape, x_strides, x_ndim)];"
    call = {"threads": view.size, "threadgroup": 8, "shape": view.shape, "dtype": view.dtype, "names": ""}
    out = run(body, {"x": view}, kernel={"ensure_row_contiguous": False}, **call)
    assert mx.array_equal(out, view)
    copied = run("out[thread_position_in_grid.x] = x[thread_position_in_grid.x];", {"x": view}, **call)
    assert mx.array_equal(copied, view)


def test_grid_that_is_no_multiple_of_the_threadgroup():
    body = """uint3 p = thread_position_in_grid;
    out[p.z * 15 + p.y * 5 + p.x] = threads_per_threadgroup.x * 100 + thread_position_in_threadgroup.y * 10 + threads_per_grid.z;"""
    kernel = mslcpu.metal_kernel("edges", [], ["out"], body)
    (out,) = kernel(inputs=[], output_shapes=[(2, 3, 5)], output_dtypes=[mx.float32], grid=(5, 3, 2), threadgroup=(4, 2, 8))
    expected = [[[(4 if x < 4 else 1) * 100 + y % 2 * 10 + 2 for x in range(5)] for y in range(3)] for _ in range(2)]
    assert out.tolist() == expected


@pytest.mark.parametrize("checked", [True, False])
def test_buffers_beyond_32_bits(checked):
    """For an input and an output of 4 GiB each, only the touched pages exist."""
    size = (1 << 32) + 64
    x = np.zeros(size, np.uint8)
    x[-64:] = np.arange(64)
    body = "out[(size_t(1) << 32) + i] = x[(ulong(1) << 32) + i];"
    with mslcpu.options(checked=checked, numpy_outputs=True):
        out = run(body, {"x": x}, shape=(size,), dtype=mx.uint8)
    assert out[-64:].tolist() == list(range(64))
