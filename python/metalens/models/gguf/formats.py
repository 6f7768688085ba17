"""Weight formats of GGUF, as MLX holds them.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q4_K are w = scale * code + bias with one scale and one bias for each group of 32 numbers. MLX's affine format is the
same, so the codes are copied bit for bit. Only the scales and biases change their type. Every other quantized format is dequantized, and quantized
again to 8 bits in groups of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.models.gguf.header import Tensor
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError

GROUP = 32
REQUANTIZED_BITS = 8
DENSE = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Affine:
    """A quantized matrix: w = scale * code + bias.

    Attributes:
        bits: bits of a code.
        codes: codes [rows, columns], uint8.
        scales: scales [rows, columns / 32], float32.
        biases: biases [rows, columns / 32], float32.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


@dataclass(frozen=True)
class Weight:
    """A tensor in MLX's form.

    Attributes:
        arrays: {"weight": array}, and "scales" and "biases" if it is quantized.
        bits: bits of a code. 0 = not quantized.
        error: largest difference from the file's number, as a fraction of the largest number of the tensor.
    """

    arrays: dict[str, mx.array]
    bits: int
    error: float


def converted(tensor: Tensor, dtype: mx.Dtype, rows: np.ndarray | None = None, offset: float = 0.0) -> Weight:
    """Convert a tensor.

    Args:
        tensor: the tensor of the file.
        dtype: type of dense numbers, scales and biases.
        rows: order of the rows in the result. None = as in the file.
        offset: a number to add to each number of a dense tensor.

    Raises:
        InvalidValueError: if the gguf package can't read the format.
    """
    with np.errstate(all="ignore"):  # numbers that are not finite give an error that is not
        return _converted(tensor, dtype, rows, offset)


def _converted(tensor: Tensor, dtype: mx.Dtype, rows: np.ndarray | None, offset: float) -> Weight:
    if tensor.kind in DENSE:
        return _dense(dequantized(tensor), dtype, rows, offset)
    if len(tensor.shape) != 2:
        raise InvalidValueError(f"Tensor {tensor.name} is {tensor.kind} and has the shape {list(tensor.shape)}: quantized tensors are matrices.")
    affine = affine_of(tensor)
    if affine is None:
        return _requantized(dequantized(tensor), dtype, rows)
    bits, codes, scales, biases = affine.bits, affine.codes, affine.scales, affine.biases
    if rows is not None:
        codes, scales, biases = codes[rows], scales[rows], biases[rows]
    new_scales, new_biases = mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)
    arrays = {"weight": mx.array(packed(codes, bits)), "scales": new_scales, "biases": new_biases}
    return Weight(arrays, bits, _rounding_error(scales, biases, new_scales, new_biases, 2**bits - 1))


def dequantized(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers, float32, in its shape.

    Raises:
        InvalidValueError: if the gguf package can't read the format.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if tensor.kind == "F64":
        return tensor.data.view(np.float64).astype(np.float32).reshape(tensor.shape)
    try:
        numbers = dequantize(np.ascontiguousarray(tensor.data), GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise InvalidValueError(f"The gguf package can't read {tensor.kind} ({tensor.name}). Quantize the model to another format.") from error
    return np.asarray(numbers, np.float32).reshape(tensor.shape)


# ------------------------------------------------------------------ the formats with groups of 32


def affine_of(tensor: Tensor) -> Affine | None:
    """Return the codes, scales and biases of a tensor. None = its format is not one of groups of 32 with a scale and a bias."""
    read = AFFINE.get(tensor.kind)
    if read is None:
        return None
    rows, columns = tensor.data.shape[0], tensor.shape[-1]
    bits, codes, scales, biases = read(np.asarray(tensor.data))
    groups = (rows, columns // GROUP)
    return Affine(bits, codes.reshape(rows, columns), scales.reshape(groups).astype(np.float32), biases.reshape(groups).astype(np.float32))


_Read = tuple[int, np.ndarray, np.ndarray, np.ndarray]


def _halves(block_bytes: np.ndarray) -> np.ndarray:
    """Return the float16 numbers in the last axis as float32."""
    return np.ascontiguousarray(block_bytes).view(np.float16).astype(np.float32)


def _nibbles(block_bytes: np.ndarray) -> np.ndarray:
    """Return the low halves of the bytes in the last axis, then their high halves."""
    return np.concatenate([block_bytes & 15, block_bytes >> 4], -1)


def _fifth_bits(block_bytes: np.ndarray) -> np.ndarray:
    """Return the 32 bits of the four bytes in the last axis, each as 0 or 16."""
    return np.unpackbits(np.ascontiguousarray(block_bytes), axis=-1, bitorder="little") << 4


def _q4_0(raw: np.ndarray) -> _Read:
    block = raw.reshape(raw.shape[0], -1, 18)
    scale = _halves(block[..., :2])
    return 4, _nibbles(block[..., 2:]), scale, -8 * scale


def _q4_1(raw: np.ndarray) -> _Read:
    block = raw.reshape(raw.shape[0], -1, 20)
    return 4, _nibbles(block[..., 4:]), _halves(block[..., :2]), _halves(block[..., 2:4])


def _q5_0(raw: np.ndarray) -> _Read:
    block = raw.reshape(raw.shape[0], -1, 22)
    scale = _halves(block[..., :2])
    return 5, _nibbles(block[..., 6:]) | _fifth_bits(block[..., 2:6]), scale, -16 * scale


def _q5_1(raw: np.ndarray) -> _Read:
    block = raw.reshape(raw.shape[0], -1, 24)
    return 5, _nibbles(block[..., 8:]) | _fifth_bits(block[..., 4:8]), _halves(block[..., :2]), _halves(block[..., 2:4])


def _q8_0(raw: np.ndarray) -> _Read:
    block = raw.reshape(raw.shape[0], -1, 34)
    scale = _halves(block[..., :2])
    return 8, block[..., 2:] ^ 128, scale, -128 * scale  # int8 + 128, as uint8


def _q4_k(raw: np.ndarray) -> _Read:
    """Read blocks of eight groups. Each group has a scale and a minimum of 6 bits, which two float16 numbers of the block multiply."""
    block = raw.reshape(raw.shape[0], -1, 144)
    first, second, third = (block[..., 4 + i : 8 + i] for i in (0, 4, 8))
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], -1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], -1)
    pairs = block[..., 16:].reshape(*block.shape[:2], 4, GROUP)  # two groups share 32 bytes
    return 4, np.stack([pairs & 15, pairs >> 4], -2), _halves(block[..., :2]) * scales, -_halves(block[..., 2:4]) * minima


AFFINE: dict[str, Callable[[np.ndarray], _Read]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k}


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes [rows, columns] as MLX does: uint32 [rows, columns * bits / 32], the first code in the lowest bits."""
    rows, columns = codes.shape
    if bits == 8:
        packed_bytes = np.ascontiguousarray(codes)
    elif bits == 4:
        packed_bytes = codes[:, ::2] | (codes[:, 1::2] << 4)
    else:
        eights = codes.reshape(rows, columns // 8, 8).astype(np.uint64)
        sums = np.zeros(eights.shape[:2], np.uint64)
        for i in range(8):
            sums |= eights[..., i] << np.uint64(i * bits)
        packed_bytes = np.ascontiguousarray(sums.astype("<u8").view(np.uint8).reshape(rows, columns // 8, 8)[..., :bits])
    return packed_bytes.reshape(rows, -1).view("<u4")


# ------------------------------------------------------------------ dense and requantized


def _dense(numbers: np.ndarray, dtype: mx.Dtype, rows: np.ndarray | None, offset: float) -> Weight:
    ordered = (numbers if rows is None else numbers[rows]) + np.float32(offset)
    array = mx.array(ordered).astype(dtype)
    return Weight({"weight": array}, 0, _relative(mx.abs(array.astype(mx.float32) - mx.array(ordered)), ordered))


def _requantized(numbers: np.ndarray, dtype: mx.Dtype, rows: np.ndarray | None) -> Weight:
    ordered = numbers if rows is None else numbers[rows]
    weight, scales, biases = mx.quantize(mx.array(ordered), group_size=GROUP, bits=REQUANTIZED_BITS)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    back = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=GROUP, bits=REQUANTIZED_BITS)
    arrays = {"weight": weight, "scales": scales, "biases": biases}
    return Weight(arrays, REQUANTIZED_BITS, _relative(mx.abs(back - mx.array(ordered)), ordered))


def _relative(difference: mx.array, numbers: np.ndarray) -> float:
    largest = float(np.abs(numbers).max())
    return to_float(difference.max()) / largest if largest else 0.0


def _rounding_error(scales: np.ndarray, biases: np.ndarray, new_scales: mx.array, new_biases: mx.array, most: int) -> float:
    """Return a bound of the error that rounded scales and biases make.

    The error of w is linear in the code, so it is largest at 0 or at the largest code.
    """
    at_zero = np.array(new_biases.astype(mx.float32)) - biases
    at_most = at_zero + most * (np.array(new_scales.astype(mx.float32)) - scales)
    largest = max(float(np.abs(biases).max()), float(np.abs(biases + most * scales).max()))
    return max(float(np.abs(at_zero).max()), float(np.abs(at_most).max())) / largest if largest else 0.0
