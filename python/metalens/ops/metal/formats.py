"""The formats of a weight as types of metal/weight.h."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metalens.ops.weight import KERNEL_FORMATS, Weight

ELEMENTS = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@dataclass(frozen=True)
class Format:
    """The Metal type that reads a weight.

    Attributes:
        mode: 'dense', or a mode of `mlx.core.quantize`.
        bits, group_size: 0 for a dense weight.
        type: the Metal type, as a template's argument.
        label: the format in a form that fits a name.
        values, scales, biases: the element types of its three arrays.
    """

    mode: str
    bits: int
    group_size: int
    type: str
    label: str
    values: str
    scales: str
    biases: str


@cache
def _made(mode: str, bits: int, group_size: int, dtype: mx.Dtype | None) -> Format:
    if mode in ("dense", "affine"):
        assert dtype is not None
        element = ELEMENTS[dtype]
        if mode == "dense":
            return Format(mode, 0, 0, f"metalens::Dense<{element}>", f"dense_{element}", element, element, element)
        label = f"affine_b{bits}_g{group_size}_{element}"
        return Format(mode, bits, group_size, f"metalens::Affine<{bits}, {group_size}, {element}>", label, "uint", element, element)
    return Format(mode, bits, group_size, f"metalens::{mode.upper()}", mode, "uint", "uchar", "uchar")


def format_of(w: Weight) -> Format:
    """Return the format of a weight for which `unreadable` is ''. The same format is the same object, which caches rely on."""
    if w.scales is None:
        return _made("dense", 0, 0, w.values.dtype)
    return _made(w.mode, w.bits, w.group_size, w.scales.dtype if w.mode == "affine" else None)


def arrays(w: Weight) -> list[mx.array]:
    """Return values, scales and biases. If the format lacks some, another array that it does not read takes their position."""
    scales = w.values if w.scales is None else w.scales
    return [w.values, scales, scales if w.biases is None else w.biases]


def all_formats() -> list[Format]:
    """Return every format that the kernels read, with every type of scales."""
    dense = [_made("dense", 0, 0, dtype) for dtype in ELEMENTS]
    quantized = [
        _made(mode, bits, group_size, dtype)
        for mode, (widths, group_sizes) in KERNEL_FORMATS.items()
        for bits in widths
        for group_size in group_sizes
        for dtype in (ELEMENTS if mode == "affine" else (None,))
    ]
    return dense + quantized
