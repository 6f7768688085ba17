"""How the formats of a weight are called in metal/weight.h."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from metalens.weight import NATIVE_FORMATS, Weight

ELEMENTS = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


class Format:
    """The Metal type that reads a weight.

    Attributes:
        type: as it stands in a template's arguments.
        label: fit for a name.
        values, scales, biases: the elements of its three arrays.
    """

    def __init__(self, mode: str, bits: int, group_size: int, dtype: mx.Dtype | None) -> None:
        if mode == "dense":
            assert dtype is not None
            element = ELEMENTS[dtype]
            self.type, self.label = f"metalens::Dense<{element}>", f"dense_{element}"
            self.values = self.scales = self.biases = element
        elif mode == "affine":
            assert dtype is not None
            element = ELEMENTS[dtype]
            self.type, self.label = f"metalens::Affine<{bits}, {group_size}, {element}>", f"affine_b{bits}_g{group_size}_{element}"
            self.values, self.scales, self.biases = "uint", element, element
        else:
            self.type, self.label = f"metalens::{mode.upper()}", mode
            self.values, self.scales, self.biases = "uint", "uchar", "uchar"


@cache
def _made(mode: str, bits: int, group_size: int, dtype: mx.Dtype | None) -> Format:
    return Format(mode, bits, group_size, dtype)


def format_of(w: Weight) -> Format:
    """The format of a weight that `native_reads`: the same object for the same format, which caches rely on."""
    if w.scales is None:
        return _made("dense", 0, 0, w.values.dtype)
    return _made(w.mode, w.bits, w.group_size, w.scales.dtype if w.mode == "affine" else None)


def arrays(w: Weight) -> list[mx.array]:
    """Values, scales and biases; in place of those that the format lacks, another array that it does not read."""
    scales = w.values if w.scales is None else w.scales
    return [w.values, scales, scales if w.biases is None else w.biases]


def all_formats() -> list[Format]:
    """Every format that the kernels read, with every type of its scales."""
    dense = [_made("dense", 0, 0, dtype) for dtype in ELEMENTS]
    quantised = [
        _made(mode, bits, group_size, dtype)
        for mode, (widths, group_sizes) in NATIVE_FORMATS.items()
        for bits in widths
        for group_size in group_sizes
        for dtype in (ELEMENTS if mode == "affine" else (None,))
    ]
    return dense + quantised
