"""Test the emulation of tensor operations: values, layouts, and the checks that hold for the simdgroup's other operations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from mslcpu.support import needs_clang

pytestmark = needs_clang

HEADER = "#include <metal_tensor>\n#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\nusing namespace metal;\n"

# Two simdgroups: y [32, 32] = x [32, K] w [32, K]^T, each its 16 rows. The operands are staged in threadgroup memory, whose rows have spare elements.
PRODUCT = """
threadgroup half xs[32 * 40];
threadgroup half ws[32 * 40];
const uint t = thread_index_in_threadgroup;
const uint simd = simdgroup_index_in_threadgroup;
using Operand = tensor<threadgroup half, extents<int, 32, 16>, tensor_inline>;
using Other = tensor<threadgroup half, dextents<int, 2>, tensor_inline>;
constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
    16, 32, 32, false, true, false, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
mpp::tensor_ops::matmul2d<descriptor, execution_simdgroup> operation;
auto sums = operation.template get_destination_cooperative_tensor<Operand, Other, float>();
for (ushort i = 0; i < sums.get_capacity(); ++i) {
  if (sums.is_valid_element(i)) {
    sums[i] = 0.0f;
  }
}
for (uint k = 0; k < 64; k += 32) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = t; e < 32 * 32; e += 64) {
    xs[e / 32 * 40 + e % 32] = x[e / 32 * 64 + k + e % 32];
    ws[e / 32 * 40 + e % 32] = w[e / 32 * 64 + k + e % 32];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Operand left(xs + simd * 16 * 40, extents<int, 32, 16>(), array<int, 2>{1, 40});
  Other right(ws, dextents<int, 2>(32, 32), array<int, 2>{1, 40});
  operation.run(left, right, sums);
}
for (ushort i = 0; i < sums.get_capacity(); ++i) {
  if (sums.is_valid_element(i)) {
    const auto index = sums.get_multidimensional_index(i);
    y[(simd * 16 + index[1]) * 32 + index[0]] = sums[i];
  }
}
"""


def product(body: str = PRODUCT) -> tuple[np.ndarray, np.ndarray]:
    """Return the product [32, 32], and the product that it should be."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(32, 64)).astype(np.float16) for _ in range(2))
    kernel = mslcpu.metal_kernel("tensors", ["x", "w"], ["y"], body, HEADER)
    (y,) = kernel(
        inputs=[mx.array(x), mx.array(w)], output_shapes=[(32, 32)], output_dtypes=[mx.float32], grid=(64, 1, 1), threadgroup=(64, 1, 1)
    )  # fmt: skip
    return np.array(y), x.astype(np.float64) @ w.astype(np.float64).T


@pytest.mark.parametrize("layout", ["permuted", "blocks"])
@pytest.mark.parametrize("schedule", mslcpu.SCHEDULES)
def test_a_product(schedule, layout):
    with mslcpu.options(schedule=schedule, seed=1, tensor_layout=layout), mslcpu.recording() as reports:
        y, expected = product()
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-5)
    assert reports[0].matrix_ops == (32 // 8) * (32 // 8) * (64 // 8)


def test_columns_and_rows_beyond_the_extents_are_zeros():
    y, expected = product(PRODUCT.replace("dextents<int, 2>(32, 32)", "dextents<int, 2>(32, 20)"))
    np.testing.assert_allclose(y[:, :20], expected[:, :20], rtol=0, atol=3e-5)
    assert not y[:, 20:].any()


# What each lane holds of the blocks of one GPU, computed instead of asked for.
ASSUMED = """const uint lane = thread_index_in_simdgroup;
  const int index[2] = {
      int(((lane / 4 & 2) + lane % 2) * 4 + i % 4 + i / 8 * 16), int((lane / 4 & 4) + lane / 2 % 4 + i / 4 % 2 * 8)};"""


def test_code_that_assumes_a_layout_fails_in_another():
    assuming = PRODUCT.replace("const auto index = sums.get_multidimensional_index(i);", ASSUMED)
    assert assuming != PRODUCT
    with mslcpu.options(tensor_layout="blocks"):
        y, expected = product(assuming)
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-5)
    with pytest.raises(mslcpu.MslError, match="different values"), mslcpu.options(tensor_layout="permuted"):
        product(assuming)


def test_code_that_takes_every_place_for_an_element_fails():
    with pytest.raises(mslcpu.MslError, match="different values|written"):
        product(PRODUCT.replace("if (sums.is_valid_element(i)) {\n    const auto", "{\n    const auto"))


def test_sums_that_do_not_start_from_zero_are_nan():
    y, _ = product(PRODUCT.replace("sums[i] = 0.0f;", ""))
    assert np.isnan(y).all()


@pytest.mark.parametrize("index", range(2))
def test_a_deleted_barrier_is_found(index):
    with pytest.raises(mslcpu.MslError, match="race|uninitialized"):
        product(mslcpu.without_barrier(PRODUCT, index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("operation.run(left, right, sums);", "if (t % 32 < 16) { operation.run(left, right, sums); }"), "tensor operation reached by some"),
        (("(xs + simd * 16 * 40,", "(xs + simd * 32 * 40,"), "out-of-bounds"),
        (("e < 32 * 32", "e < 31 * 32"), "uninitialized"),
        (("false, true, false,", "false, true, true,"), "relaxed precision"),
        (("<descriptor, execution_simdgroup>", "<descriptor, execution_simdgroups<2>>"), "single simdgroup"),
        (("#include <metal_tensor>", "#include <MetalPerformancePrimitives/Others.h>"), "is not a Metal header"),
        (("#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>", ""), "undeclared identifier 'mpp'"),
    ],
    ids=["some lanes", "beyond the memory", "not staged", "relaxed", "two simdgroups", "other header", "no header"],
)  # fmt: skip
def test_checks(change, message, monkeypatch):
    before, after = change
    monkeypatch.setitem(globals(), "HEADER", HEADER.replace(before, after))
    with pytest.raises(mslcpu.MslError, match=message):
        product(PRODUCT.replace(before, after))
