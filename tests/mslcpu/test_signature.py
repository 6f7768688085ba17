"""Test that the generated signature equals MLX's exactly."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from mslcpu.signature import ATTRIBUTES, Input, write_signature
from mslcpu.support import needs_clang


def test_shapes_address_spaces_and_attributes():
    source = "out[thread_position_in_grid.x] = a[a_shape[0]] + b_strides[0] + simd_sum(1); // thread_index_in_simdgroup b_ndim"
    inputs = [Input("a", mx.float32, 100, 2), Input("b", mx.bfloat16, 7, 1), Input("c", mx.int64, 1, 0)]
    assert write_signature("f", source, inputs, [("out", mx.float16), ("more", mx.bool_)]) == (
        "[[kernel]] void f(\n"
        "  const device float* a [[buffer(0)]],\n"
        "  const constant int* a_shape [[buffer(1)]],\n"
        "  const constant bfloat16_t* b [[buffer(2)]],\n"
        "  const constant int64_t* b_strides [[buffer(3)]],\n"
        "  const constant int& b_ndim [[buffer(4)]],\n"
        "  const constant int64_t& c [[buffer(5)]],\n"
        "  device float16_t* out [[buffer(6)]],\n"
        "  device bool* more [[buffer(7)]],\n"
        "  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],\n"
        "  uint3 thread_position_in_grid [[thread_position_in_grid]]) {\n"
    )


def test_templates_and_atomic_outputs():
    text = write_signature(
        "f", "threads_per_simdgroup", [Input("x", mx.uint8, 8, 1)], [("y", mx.uint32)], [("T", mx.float16), ("n", 3), ("b", True)], True
    )
    assert text == (
        "template <typename T, int n, bool b>\n"
        "[[kernel]] void f(\n"
        "  const device uint8_t* x [[buffer(0)]],\n"
        "  device atomic<uint32_t>* y [[buffer(1)]],\n"
        "  uint threads_per_simdgroup [[threads_per_simdgroup]]) {\n"
    )


def test_names_are_found_as_substrings():
    """Like MLX: a name inside another name declares a second parameter."""
    text = write_signature("f", "dispatch_threads_per_threadgroup", [], [("y", mx.float32)])
    assert "uint3 dispatch_threads_per_threadgroup [[" in text
    assert "uint3 threads_per_threadgroup [[" in text


def test_scalars_have_no_shape():
    assert "x_shape" not in write_signature("f", "x_shape", [Input("x", mx.float32, 1, 0)], [("y", mx.float32)])


def test_without_attributes_the_list_can_end_too_early():
    """MLX counts inputs and outputs, but not shapes. A kernel that MLX cannot compile for that reason must not compile here."""
    text = write_signature("f", "x_shape", [Input("x", mx.float32, 8, 1)], [("y", mx.float32), ("z", mx.float32)])
    assert "y [[buffer(2)]]) {\n" in text


@needs_clang
def test_every_attribute_has_its_value():
    body = "if (all(thread_position_in_grid == uint3(9, 1, 1))) {\n"
    scalars = [name for name, (kind, _) in ATTRIBUTES.items() if kind == "uint"]
    body += "".join(f"out[{i}] = {name};\n" for i, name in enumerate(scalars))
    vectors = [name for name, (kind, _) in ATTRIBUTES.items() if kind == "uint3"]
    body += "".join(f"for (int j = 0; j < 3; j++) out[{20 + 3 * i} + j] = {name}[j];\n" for i, name in enumerate(vectors)) + "}"
    kernel = mslcpu.metal_kernel("attributes", [], ["out"], body)
    (out,) = kernel(inputs=[], output_shapes=[(60,)], output_dtypes=[mx.uint32], grid=(10, 3, 2), threadgroup=(8, 2, 16))
    found = dict(zip(scalars, out.tolist(), strict=False)) | {name: out[20 + 3 * i : 23 + 3 * i].tolist() for i, name in enumerate(vectors)}
    # Thread (9, 1, 1) is (1, 1, 1) of a threadgroup cut to 2 x 2 x 2.
    assert found == {
        "dispatch_quadgroups_per_threadgroup": 8, "dispatch_simdgroups_per_threadgroup": 1, "dispatch_threads_per_threadgroup": [8, 2, 2],
        "grid_origin": [0, 0, 0], "grid_size": [10, 3, 2], "quadgroup_index_in_threadgroup": 1, "quadgroups_per_threadgroup": 2,
        "simdgroup_index_in_threadgroup": 0, "simdgroups_per_threadgroup": 1, "thread_execution_width": 32, "thread_index_in_quadgroup": 3,
        "thread_index_in_simdgroup": 7, "thread_index_in_threadgroup": 7, "thread_position_in_grid": [9, 1, 1],
        "thread_position_in_threadgroup": [1, 1, 1], "threadgroup_position_in_grid": [1, 0, 0], "threadgroups_per_grid": [2, 2, 1],
        "threads_per_grid": [10, 3, 2], "threads_per_simdgroup": 32, "threads_per_threadgroup": [2, 2, 2],
    }  # fmt: skip


@needs_clang
def test_small_and_scalar_inputs():
    kernel = mslcpu.metal_kernel("small", ["a", "b", "c"], ["out"], "out[thread_position_in_grid.x] = a[1] + b + c[9];")
    call = {"output_shapes": [(4,)], "output_dtypes": [mx.float32], "grid": (4, 1, 1), "threadgroup": (4, 1, 1)}
    (out,) = kernel(inputs=[mx.array([1, 2]), 0.5, np.arange(10, dtype=np.float64)], **call)
    assert out.tolist() == [11.5] * 4


def test_wrong_numbers_of_arrays():
    kernel = mslcpu.metal_kernel("numbers", ["a"], ["out"], "")
    call = {"output_shapes": [(4,)], "output_dtypes": [mx.float32], "grid": (4, 1, 1), "threadgroup": (4, 1, 1)}
    with pytest.raises(ValueError, match="Expected `inputs` to have size 1 but got size 0"):
        kernel(inputs=[], **call)
    with pytest.raises(ValueError, match="at least one output"):
        mslcpu.metal_kernel("none", ["a"], [], "")
