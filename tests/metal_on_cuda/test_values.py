"""Test the values of the translated programs: they run on the CPU and are compared with float64, like the kernels themselves."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_on_cuda.cpu import CpuExecutor
from metal_on_cuda.kernel import factory
from metalens import use_backend
from metalens.ops.metal import kernel as metal_kernel
from support import metal_cells
from support.metal_emulation import M1, needs_clang

pytestmark = needs_clang

CELLS = [
    "lens_stats-affine4g64-float32-primes", "lens_stats-affine4g64-float16-tiles", "lens_stats_vector-nvfp4-bfloat16-few",
    "lens_kl-affine3g32-float16-primes", "lens_kl_offset-dense-float32-tiles", "lens_compare-dense-float32-primes", "linear-mxfp8-bfloat16-primes",
    "translate_norm_layer-dense-float16-primes",
]  # fmt: skip


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    return CpuExecutor(tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("name", CELLS)
def test_cells_agree_with_float64(executor, name):
    (cell,) = [c for c in metal_cells.cells() if str(c) == name]
    with metal_kernel.emulation(factory(executor), M1), use_backend("metal"):
        errors = metal_cells.run(cell)
    assert errors.good, f"off by {errors.ours:.2e}, plain MLX by {errors.plain:.2e}"


def run(executor, body, *inputs, size=32):
    made = factory(executor)("test", ["x", "y"][: len(inputs)], ["out"], body, "using namespace metal;\n")
    (out,) = made(inputs=inputs, grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(size,)], output_dtypes=[mx.float32])
    return np.array(out)


LANE = "const int lane = thread_index_in_simdgroup;\n"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_sum(x[lane])", lambda x: np.full(32, x.sum())),
        ("simd_max(x[lane])", lambda x: np.full(32, x.max())),
        ("float(simd_min(lane < 3 ? 40 : lane))", lambda x: np.full(32, 3)),
        ("float(simd_or(1u << lane) == 0xffffffffu)", lambda x: np.ones(32)),
        ("simd_shuffle_up(x[lane], 2)", lambda x: x[np.maximum(np.arange(32) - 2, 0)]),
        ("simd_shuffle_xor(x[lane], 5)", lambda x: x[np.arange(32) ^ 5]),
        ("float(simd_broadcast(half(x[lane]), 7))", lambda x: np.full(32, x[7])),
        ("simd_any(lane == 9) && !simd_all(lane == 9) ? 1.0f : 0.0f", lambda x: np.ones(32)),
        ("float(half(x[lane] / 3.0f)) + float(bfloat(x[lane] / 3.0f))", lambda x: rounded(x / 3, mx.float16) + rounded(x / 3, mx.bfloat16)),
        ("dot(float4(*reinterpret_cast<const device packed_float4*>(x + lane % 28 + 1)), float4(1.0f, 10.0f, 100.0f, 1000.0f))",
         lambda x: sum(10**i * x[np.arange(32) % 28 + 1 + i] for i in range(4))),
        ("(as_type<half2>(0x64006400u | uint(lane) << 16 | 3u) - half2(half(1024.0f)))[1]", lambda x: np.arange(32)),
    ],
)  # fmt: skip
def test_functions(executor, expression, expected):
    x = np.arange(32, dtype=np.float32) * 2
    np.testing.assert_array_equal(run(executor, f"{LANE}out[lane] = {expression};", mx.array(x)), expected(x).astype(np.float32))


def rounded(x, dtype):
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("element", ["float", "half"])
def test_products_of_matrices(executor, rng, element, transposed):
    x, y = (rng.integers(-8, 8, (8, 12)).astype(np.float32) for _ in range(2))
    body = f"""{LANE}threadgroup {element} s[96];
    for (int i = lane; i < 96; i += 32) s[i] = {element}(y[i]);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<float, 8, 8> a, c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_matrix<{element}, 8, 8> b;
    simdgroup_load(a, x + 2, 12);
    simdgroup_load(b, s, 12, ulong2(0), {str(transposed).lower()});
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, out, 8);"""
    found = run(executor, body, mx.array(x), mx.array(y), size=64).reshape(8, 8)
    b = y[:, :8].T if transposed else y[:, :8]
    np.testing.assert_array_equal(found, x[:, 2:10] @ b + 1)
