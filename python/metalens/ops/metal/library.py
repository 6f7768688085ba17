"""The kernels of the ahead-of-time library: those that a lens on a usual model needs. Any other kernel is compiled just in time."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from metalens.ops.metal import descriptors
from metalens.ops.metal.formats import Format, all_formats
from metalens.ops.metal.kernel import Kernel
from metalens.ops.metal.tuning import GENERATIONS, MATMUL_BLOCKS, MATRIX_UNIT_GENERATION, STATS_BLOCKS, tile_rows


def usual_formats() -> list[Format]:
    """Return dense formats, those with 8-bit scales, and affine ones with 16-bit scales: groups of 64, and all groups for 4 and 8 bits."""

    def usual(f: Format) -> bool:
        if f.mode != "affine":
            return True
        return f.scales != "float" and (f.group_size == 64 or f.bits in (4, 8))

    return [f for f in all_formats() if usual(f)]


def of_format(f: Format) -> list[Kernel]:
    """Return the kernels for a head of this format. Rows are float32, as metalens.ops passes them."""
    kernels = [descriptors.lens_stats_vector(mx.float32, f), descriptors.lens_label_logits_vector(mx.float32, f)]
    for rounded in (False, True):
        kernels += [descriptors.lens_stats(mx.float32, f, rows, rounded) for rows in STATS_BLOCKS]
        kernels += [descriptors.lens_label_logits(mx.float32, f, rows, rounded) for rows in STATS_BLOCKS]
        if not (f.mode == "dense" and f.values == "float"):  # products with it are MLX's
            kernels += [descriptors.linear(mx.float32, f, rows, rounded) for rows in MATMUL_BLOCKS]
        kernels += [descriptors.lens_backward(mx.float16 if rounded else mx.float32, f, rows) for rows in MATMUL_BLOCKS]
    return kernels


def of_no_format() -> list[Kernel]:
    """Return the kernels that do not depend on a format."""
    return [
        descriptors.lens_stats_merge(),
        descriptors.lens_softmax_grad(mx.float32),
        descriptors.lens_softmax_grad(mx.float16),
        descriptors.lens_compare(),
        descriptors.norm_grad(),
    ]


def translation_units() -> dict[str, list[Kernel]]:
    """Return {name of a .metal file: its kernels}."""
    return {"shared": of_no_format(), **{f.label: of_format(f) for f in usual_formats()}}


def tensor_units() -> dict[str, list[Kernel]]:
    """Return {name: kernels} with tiles of tensor operations, as they are compiled just in time.

    They need Metal 4, and so macOS 26. The library is for macOS 14 on, so it does not hold them.
    """

    def of(f: Format) -> list[Kernel]:
        kernels = []
        for rounded in (False, True):
            for rows in tile_rows(STATS_BLOCKS, replace(GENERATIONS[MATRIX_UNIT_GENERATION], tensor_tiles=True)):
                specialization = (mx.float32, f, rows, rounded, True)
                kernels += [make(*specialization) for make in (descriptors.lens_stats, descriptors.lens_label_logits, descriptors.linear)]
        return kernels

    return {f"{f.label}_tensor": of(f) for f in usual_formats()}


def text(kernels: list[Kernel]) -> str:
    """Return the text of a .metal file, which includes the headers of metal/."""
    includes = "".join(f'#include "{header}"\n' for header in sorted({k.header for k in kernels}))
    return includes + "\n" + "\n".join(k.definition for k in kernels)
