"""linear(x, W): the product with a frozen or trainable matrix, dense or quantized."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.backends import native, precision
from metalens.ops.weight import FLOATS, Weight, kernels_support


def linear(x: mx.array, w: Weight, transpose: bool = True, dtype: mx.Dtype | None = None) -> mx.array:
    """X W^T, or x W with transpose=False, for a dense or quantized W.

    Args:
        x: [..., I], or [..., O] with transpose=False; float32, float16 or bfloat16.
        w: the matrix [O, I].
        transpose: the orientation.
        dtype: of the result; None = the promoted type of x and the weight's values or scales.

    Returns:
        [..., O] or [..., I]. The native kernels accumulate in float32 and round once.
    """
    if w.scales is not None:
        return quantized_matmul(x, w.values, w.scales, w.biases, w.group_size, w.bits, transpose, w.mode, dtype)
    extension = native()
    if extension is not None and kernels_support(w) and x.dtype in FLOATS:
        product: mx.array = extension.matmul(x, w.values, transpose, dtype, precision())
        return product
    plain = x @ (w.values.T if transpose else w.values)
    return plain if dtype is None else plain.astype(dtype)


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
    """X W^T, or x W with transpose=False, for a packed W: `mlx.core.quantized_matmul` on whichever backend is in use.

    Args:
        x: [..., I], or [..., O] with transpose=False; float32, float16 or bfloat16.
        w: [O, I * bits / 32] uint32.
        scales: [O, I / group_size].
        biases: like scales for mode 'affine', else None.
        group_size, bits, mode: as in `mlx.core.quantize`. Plain MLX takes over for formats that the native kernels do not read.
        transpose: the orientation.
        dtype: of the result; None = as plain MLX, the promoted type of x and (affine) the scales.

    Returns:
        [..., O] or [..., I]. The native kernels accumulate in float32 and round once.
    """
    computed = mx.result_type(x, scales) if mode == "affine" else x.dtype
    dtype = dtype or computed
    if x.dtype in FLOATS and kernels_support(Weight(w, scales, biases, group_size, bits, mode)):
        extension = native()
        if extension is not None:
            product: mx.array = extension.quantized_matmul(
                x.astype(computed), w, scales, biases, group_size, bits, transpose, mode, dtype, precision()
            )
            return product
    if x.size == 0:  # mx.quantized_matmul divides by the number of rows
        return mx.zeros((*x.shape[:-1], w.shape[0] if transpose else w.shape[1] * 32 // bits), dtype)
    return mx.quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode).astype(dtype)
