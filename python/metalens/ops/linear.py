"""linear(x, W): the product with a frozen or trainable matrix, dense or quantised."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.backend import native

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
NATIVE_BITS = (2, 3, 4, 5, 6, 8)
NATIVE_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Weight:
    """A matrix W [O, I] as MLX stores it: dense, or packed along I with one scale (and bias) per group of `group_size` columns.

    Attributes:
        values: [O, I] floats, or [O, I * bits / 32] uint32 when quantised.
        scales: [O, I / group_size], or None when dense.
        biases: like scales for mode 'affine', else None.
        group_size, bits, mode: as in `mlx.core.quantize`; ignored when dense.
    """

    values: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), unpacked."""
        rows, columns = self.values.shape
        return rows, columns if self.scales is None else columns * 32 // self.bits


def linear(x: mx.array, w: Weight, transpose: bool = True) -> mx.array:
    """X W^T, or x W with transpose=False, for a dense or quantised W.

    Args:
        x: [..., I], or [..., O] with transpose=False; float32, float16 or bfloat16.
        w: the matrix [O, I].
        transpose: the orientation.

    Returns:
        [..., O] or [..., I], in the promoted type of x and the weight's values or scales. The native kernels accumulate in float32.
    """
    if w.scales is not None:
        return quantized_matmul(x, w.values, w.scales, w.biases, w.group_size, w.bits, transpose, w.mode)
    extension = native()
    if extension is not None and x.dtype in FLOATS and w.values.dtype in FLOATS and w.values.ndim == 2:
        product: mx.array = extension.matmul(x, w.values, transpose)
        return product
    return x @ (w.values.T if transpose else w.values)


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int = 64,
    bits: int = 4,
    transpose: bool = True,
    mode: str = "affine",
) -> mx.array:
    """X W^T, or x W with transpose=False, for a packed W: `mlx.core.quantized_matmul` on whichever backend is in use.

    Args:
        x: [..., I], or [..., O] with transpose=False; float32, float16 or bfloat16.
        w: [O, I * bits / 32] uint32.
        scales: [O, I / group_size].
        biases: like scales for mode 'affine', else None.
        group_size, bits, mode: as in `mlx.core.quantize`. The native kernels take affine 2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128; the rest is
            plain MLX.
        transpose: the orientation.

    Returns:
        [..., O] or [..., I], in the promoted type of x and (affine) the scales. The native kernels accumulate in float32.
    """
    # Plain MLX computes in the promoted type of x and affine scales, and returns it.
    dtype = mx.result_type(x, scales) if mode == "affine" else x.dtype
    if mode == "affine" and biases is not None and _native_can(x, scales, biases, group_size, bits):
        extension = native()
        if extension is not None:
            product: mx.array = extension.quantized_matmul(x.astype(dtype), w, scales, biases, group_size, bits, transpose)
            return product
    if x.size == 0:  # mx.quantized_matmul divides by the number of rows
        return mx.zeros((*x.shape[:-1], w.shape[0] if transpose else w.shape[1] * 32 // bits), dtype)
    return mx.quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode)


def _native_can(x: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> bool:
    return bits in NATIVE_BITS and group_size in NATIVE_GROUPS and x.dtype in FLOATS and scales.dtype in FLOATS and biases.dtype == scales.dtype
