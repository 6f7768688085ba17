"""Helpers of the self-tests: short ways to run a kernel, and two kernels to mutate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mslcpu

needs_clang = pytest.mark.skipif(mslcpu.unavailable() is not None, reason=f"mslcpu: {mslcpu.unavailable()}")

# Names that the sources of the tests use.
NAMES = """uint i = thread_position_in_grid.x;
uint t = thread_position_in_threadgroup.x;
uint lane = thread_index_in_simdgroup;
"""


def run(  # a kernel with one output
    body: str,
    inputs: dict[str, Any] | None = None,
    threads: int = 64,
    threadgroup: int | None = None,
    shape: Sequence[int] | None = None,
    dtype: mx.Dtype = mx.float32,
    header: str = "",
    names: str = NAMES,
    kernel: dict[str, Any] | None = None,
    **call: Any,
) -> mx.array:
    """Run a body. Its line 1 is line 4 of the kernel unless it defines its own names. x is 0, 1, 2, ... unless inputs are given."""
    inputs = {"x": mx.arange(threads, dtype=mx.float32)} if inputs is None else inputs
    made = mslcpu.metal_kernel("test", list(inputs), ["out"], names + body, header, **(kernel or {}))
    (result,) = made(
        inputs=list(inputs.values()), output_shapes=[shape or (threads,)], output_dtypes=[dtype],
        grid=(threads, 1, 1), threadgroup=(threadgroup or threads, 1, 1), **call,
    )  # fmt: skip
    return result


def values(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)) if array.dtype == mx.bfloat16 else np.array(array)


# The sum of each threadgroup's elements. Partial sums of the simdgroups are exchanged in threadgroup memory, twice through the same words.
REDUCTION = """
uint i = thread_position_in_grid.x;
threadgroup float sums[32];
float sum = 0;
for (int pass = 0; pass < 2; pass++) {
  float part = simd_sum(x[i] * float(pass + 1));
  if (thread_index_in_simdgroup == 0) {
    sums[simdgroup_index_in_threadgroup] = part;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 0; s < simdgroups_per_threadgroup; s++) {
    sum += sums[s];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (thread_index_in_threadgroup == 0) {
  out[threadgroup_position_in_grid.x] = sum;
}
"""


def reduction(source: str = REDUCTION) -> tuple[mx.array, mx.array]:
    """Return (computed, expected)."""
    x = mx.arange(256, dtype=mx.float32)
    kernel = mslcpu.metal_kernel("reduction", ["x"], ["out"], source)
    (out,) = kernel(inputs=[x], output_shapes=[(2,)], output_dtypes=[mx.float32], grid=(256, 1, 1), threadgroup=(128, 1, 1))
    return out, 3 * x.reshape(2, 128).sum(axis=1)


# out = x w^T in tiles of 32 x 32 with four simdgroups and 4-bit weights. The result passes through the operands' memory.
MATMUL = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
namespace tiled {
struct FourBits {
  static constexpr constant int bits = 4;
  static METAL_FUNC float unpack(uint word, int i) { return float((word >> (bits * i)) & 15u) * factors[i]; }
  static constexpr constant float factors[8] = {1, 1, 1, 1, 1, 1, 1, 1};
};
template <typename T, typename Format, int BM, int BN, int BK>
METAL_FUNC void multiply(const device T* x, const device uint* w, device T* out, int M, int N, int K, threadgroup float* shared,
                         uint3 group, uint simd, uint lane) {
  threadgroup half* xs = reinterpret_cast<threadgroup half*>(shared);
  threadgroup half* ws = xs + BM * BK;
  simdgroup_matrix<float, 8, 8> sums[2][2];
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  const int m0 = int(group.y) * BM, n0 = int(group.x) * BN, me = int(simd * 32 + lane);
  const int m = int(simd / 2) * 16, n = int(simd % 2) * 16;
  for (int k0 = 0; k0 < K; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = me; i < BM * BK; i += 128) xs[i] = m0 + i / BK < M ? half(float(x[ulong(m0 + i / BK) * K + k0 + i % BK])) : half(0);
    for (int i = me; i < BN * BK / 8; i += 128) {
      const uint word = w[ulong(n0 + i / (BK / 8)) * (K / 8) + k0 / 8 + i % (BK / 8)];
      for (int j = 0; j < 8; j++) ws[8 * i + j] = half(Format::unpack(word, j));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < BK; k += 8) {
      simdgroup_matrix<half, 8, 8> a[2], b[2];
      for (int i = 0; i < 2; i++) simdgroup_load(a[i], xs + (m + 8 * i) * BK + k, BK);
      for (int j = 0; j < 2; j++) simdgroup_load(b[j], ws + (n + 8 * j) * BK + k, BK, 0, true);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) simdgroup_store(sums[i][j], shared + (m + 8 * i) * BN + n + 8 * j, BN);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = me; i < BM * BN; i += 128)
    if (m0 + i / BN < M) out[ulong(m0 + i / BN) * N + n0 + i % BN] = static_cast<T>(shared[i]);
}
}  // namespace tiled
"""
MATMUL_SOURCE = """
threadgroup float shared[1024];
tiled::multiply<T, tiled::FourBits, 32, 32, 32>(x, w, out, size[0], size[1], size[2], shared, threadgroup_position_in_grid,
                                                simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""


def matmul(m: int, n: int, k: int, dtype: mx.Dtype = mx.float32, header: str = MATMUL) -> tuple[np.ndarray, np.ndarray]:
    """Return (computed, expected)."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((m, k), np.float32)).astype(dtype)
    w = rng.integers(0, 1 << 32, (n, k // 8), dtype=np.uint32)
    kernel = mslcpu.metal_kernel("matmul", ["x", "w", "size"], ["out"], MATMUL_SOURCE, header)
    (out,) = kernel(
        inputs=[x, w, mx.array([m, n, k], mx.int32)], output_shapes=[(m, n)], output_dtypes=[dtype],
        grid=(n // 32 * 128, (m + 31) // 32, 1), threadgroup=(128, 1, 1), template=[("T", dtype)],
    )  # fmt: skip
    codes = (w[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(n, k)
    rounded = np.array(x.astype(mx.float16).astype(mx.float32), np.float64)
    return values(out), rounded @ codes.T.astype(np.float64)
