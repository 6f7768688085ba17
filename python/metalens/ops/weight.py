"""A matrix as MLX stores it, and the formats that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

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
