"""Tensors of GGUF files in every format: the same codes, or 8 bits with an error that is told."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from metalens.models.gguf.formats import AFFINE, affine_of, converted
from metalens.models.gguf.header import Tensor
from metalens.utils.errors import InvalidValueError
from support.gguf_files import blocks


def tensor_of(kind, rows=5, columns=512, seed=0):
    return Tensor("blk.0.ffn_up.weight", kind.name, (rows, columns), blocks(kind, rows, columns, np.random.default_rng(seed)))


def unpacked(weight):
    arrays = {name: weight.arrays[name] if name == "weight" else weight.arrays[name].astype(mx.float32) for name in weight.arrays}
    return np.array(mx.dequantize(arrays["weight"], arrays["scales"], arrays["biases"], group_size=32, bits=weight.bits))


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_format_of_groups_of_32_keeps_its_codes(name, dtype):
    tensor = tensor_of(Kind[name])
    expected = gguf.quants.dequantize(tensor.data, Kind[name])
    affine = affine_of(tensor)
    groups = affine.codes.reshape(5, 16, 32).astype(np.float32)
    exact = (affine.scales[..., None] * groups + affine.biases[..., None]).reshape(5, 512)
    np.testing.assert_array_equal(exact, expected)
    weight = converted(tensor, dtype)
    difference = np.abs(unpacked(weight) - expected).max() / np.abs(expected).max()
    assert difference <= weight.error + 1e-6
    assert weight.bits == affine.bits
    if dtype == mx.float32 or (dtype == mx.float16 and name != "Q4_K"):
        assert weight.error == 0
        np.testing.assert_allclose(unpacked(weight), expected, rtol=0, atol=1e-7)
    else:
        assert 0 < weight.error < (0.02 if dtype == mx.bfloat16 else 0.002)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_another_format_is_requantized(kind):
    tensor = tensor_of(kind)
    expected = gguf.quants.dequantize(tensor.data, kind)
    weight = converted(tensor, mx.float32)
    assert weight.bits == 8
    difference = np.abs(unpacked(weight) - expected).max() / np.abs(expected).max()
    assert difference == pytest.approx(weight.error, rel=1e-3)
    assert difference < 0.008  # half a step of 8 bits is 0.4 % of the largest number; MLX may move the steps so that 0 is one


def test_rows_in_another_order():
    tensor, order = tensor_of(Kind.Q5_0), np.array([4, 0, 3, 1, 2])
    np.testing.assert_array_equal(unpacked(converted(tensor, mx.float32, order)), unpacked(converted(tensor, mx.float32))[order])


def test_a_quantized_vector_is_refused():
    tensor = tensor_of(Kind.Q8_0, rows=1)
    with pytest.raises(InvalidValueError, match=r"shape \[512\]: quantized tensors are matrices"):
        converted(Tensor(tensor.name, "Q8_0", (512,), tensor.data), mx.float32, np.array([1]))
