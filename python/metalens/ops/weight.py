"""A matrix as MLX stores it, and the formats that the kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# {mode: (bits, group sizes)} that the native and the Metal kernels read.
KERNEL_FORMATS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Weight:
    """A matrix W [O, I] as MLX stores it: dense, or packed along I with one scale (and bias) per group of `group_size` columns.

    Attributes:
        values: [O, I] floats, or [O, I * bits / 32] uint32 if quantized.
        scales: [O, I / group_size], or None if dense.
        biases: same shape as scales for mode 'affine', else None.
        group_size, bits, mode: as in `mlx.core.quantize`; ignored if dense.
    """

    values: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @classmethod
    def from_layer(cls, layer: nn.Module) -> Weight:
        """Take the matrix of an `mlx.nn` linear or embedding layer, quantized or not."""
        if "scales" in layer:
            return cls(layer["weight"], layer["scales"], layer.get("biases"), layer.group_size, layer.bits, getattr(layer, "mode", "affine"))
        return cls(layer["weight"])

    @property
    def shape(self) -> tuple[int, int]:
        """The unpacked shape (O, I)."""
        rows, columns = self.values.shape
        return rows, columns if self.scales is None else columns * 32 // self.bits


def unreadable(w: Weight) -> str:
    """Return the reason why the native and the Metal kernels can't read this matrix, or ''."""
    if w.scales is None:
        return "" if w.values.dtype in FLOATS and w.values.ndim == 2 else f"the kernels read no dense weights {w.values.dtype} {w.values.shape}"
    bits, group_sizes = KERNEL_FORMATS.get(w.mode, ((), ()))
    if w.bits not in bits or w.group_size not in group_sizes:
        return f"the kernels read no {w.mode} weights of {w.bits} bits in groups of {w.group_size}"
    if w.mode == "affine" and (w.biases is None or w.scales.dtype not in FLOATS or w.biases.dtype != w.scales.dtype):
        return "the kernels read affine weights only if scales and biases have one float type"
    return ""


def unpacked_rows(w: Weight, ids: mx.array) -> mx.array:
    """Return some rows of a matrix as numbers [len(ids), I], float32. Only these rows are unpacked. Lazy.

    Args:
        w: the matrix W [O, I].
        ids: [N] numbers of rows, 0 <= id < O.
    """
    scales, biases = (None if a is None else mx.take(a, ids, axis=0) for a in (w.scales, w.biases))
    return _unpacked(replace(w, values=mx.take(w.values, ids, axis=0), scales=scales, biases=biases))


def unpacked_columns(w: Weight, start: int, stop: int) -> mx.array:
    """Return some neighboring columns of a matrix as rows [stop - start, O], float32. Only their groups are unpacked. Lazy.

    Args:
        w: the matrix W [O, I].
        start, stop: the columns, 0 <= start < stop <= I.
    """
    if w.scales is None:
        return w.values[:, start:stop].T.astype(mx.float32)
    step = math.lcm(w.group_size, 32)  # 32 codes of any number of bits fill whole words
    first, last = start // step * step, min(-(-stop // step) * step, w.shape[1])
    words = slice(first * w.bits // 32, last * w.bits // 32)
    groups = slice(first // w.group_size, last // w.group_size)
    biases = None if w.biases is None else w.biases[:, groups]
    part = replace(w, values=w.values[:, words], scales=w.scales[:, groups], biases=biases)
    return _unpacked(part)[:, start - first : stop - first].T


def _unpacked(w: Weight) -> mx.array:
    """Return a whole matrix as numbers, float32."""
    if w.scales is None:
        return w.values.astype(mx.float32)
    scales, biases = w.scales, w.biases
    if w.mode == "affine" and biases is not None:  # MLX computes in their type
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(w.values, scales, biases, w.group_size, w.bits, w.mode, dtype=mx.float32)
