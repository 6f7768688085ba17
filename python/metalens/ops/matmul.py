"""Products: linear(x, W) with a frozen or trainable matrix, dense or quantized, and those whose result is known to be symmetric."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.autograd import with_gradient_of
from metalens.ops.backends import extension, extension_precision
from metalens.ops.dispatch import Operation
from metalens.ops.weight import FLOATS, Weight, unreadable


def linear(x: mx.array, w: Weight, transpose: bool = True, dtype: mx.Dtype | None = None) -> mx.array:
    """Return the product x W^T, or x W with transpose=False, for a dense or quantized W. Lazy.

    Differentiable in x, and in a dense W.

    Args:
        x: [..., I], or [..., O] with transpose=False; float32, float16 or bfloat16.
        w: the matrix W [O, I].
        transpose: True for x W^T, False for x W.
        dtype: type of the result; None = the promoted type of x and the values (dense), or that of `quantized_matmul`.

    Returns:
        [..., O], or [..., I] with transpose=False. The native kernels accumulate in float32 and round once.
    """
    return _LINEAR(x, w, transpose, dtype)


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int = 64,
    bits: int = 4,
    transpose: bool = True,
    mode: str = "affine",
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Return `linear` of x and a packed W, with the arguments of `mlx.core.quantized_matmul`. Lazy.

    Args:
        x: [..., I], or [..., O] with transpose=False; float32, float16 or bfloat16.
        w: [O, I * bits / 32] uint32.
        scales: [O, I / group_size].
        biases: same shape as scales for mode 'affine', else None.
        group_size, bits, mode: as in `mlx.core.quantize`. Plain MLX computes the formats that the native kernels do not read.
        transpose: True for x W^T, False for x W.
        dtype: type of the result; None = as in plain MLX: the promoted type of x and the scales ('affine'), or the type of x.

    Returns:
        [..., O], or [..., I] with transpose=False. The native kernels accumulate in float32 and round once.
    """
    return _LINEAR(x, Weight(w, scales, biases, group_size, bits, mode), transpose, dtype)


def gram(x: mx.array) -> mx.array:
    """Return x x^T for each matrix of x, at half the work of a product. Lazy and differentiable.

    Args:
        x: [..., N, K]; float32, float16 or bfloat16.

    Returns:
        [..., N, N] in the type of x, exactly symmetric. The native kernels accumulate in float32 and round once.
    """
    return _GRAM(x)


def _reference(x: mx.array, w: Weight, transpose: bool, dtype: mx.Dtype | None) -> mx.array:
    if w.scales is None:
        y = x @ (w.values.T if transpose else w.values)
        return y if dtype is None else y.astype(dtype)
    dtype = dtype or _computed_type(x, w, w.scales)
    if x.size == 0:  # mx.quantized_matmul divides by the number of rows
        return mx.zeros((*x.shape[:-1], w.shape[0 if transpose else 1]), dtype)
    return mx.quantized_matmul(x, w.values, w.scales, w.biases, transpose, w.group_size, w.bits, w.mode).astype(dtype)


def _native(x: mx.array, w: Weight, transpose: bool, dtype: mx.Dtype | None) -> mx.array:
    y: mx.array
    if w.scales is None:
        y = extension().matmul(x, w.values, transpose, dtype, extension_precision())
        return y
    computed = _computed_type(x, w, w.scales)
    packed = (w.values, w.scales, w.biases, w.group_size, w.bits)
    y = extension().quantized_matmul(x.astype(computed), *packed, transpose, w.mode, dtype or computed, extension_precision())
    return y


def _computed_type(x: mx.array, w: Weight, scales: mx.array) -> mx.Dtype:
    return mx.result_type(x, scales) if w.mode == "affine" else x.dtype


def _why_not_native(x: mx.array, w: Weight, transpose: bool, dtype: mx.Dtype | None) -> str:
    return unreadable(w) if x.dtype in FLOATS else f"the kernels read no x of {x.dtype}"


_LINEAR = Operation("linear", _reference, native=(_why_not_native, _native))


def _gram_reference(x: mx.array) -> mx.array:
    lower = mx.tril(x @ x.swapaxes(-1, -2))
    return lower + mx.tril(lower, -1).swapaxes(-1, -2)


def _gram_native(x: mx.array) -> mx.array:
    precision = extension_precision()
    return with_gradient_of(_gram_reference, lambda x: extension().gram(x, precision))(x)


def _why_not_gram_native(x: mx.array) -> str:
    if x.ndim < 2:
        return "x is not a matrix"
    return "" if x.dtype in FLOATS else f"the kernels read no x of {x.dtype}"


_GRAM = Operation("gram", _gram_reference, native=(_why_not_gram_native, _gram_native))
