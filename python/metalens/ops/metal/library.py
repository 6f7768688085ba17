"""The kernels that the ahead-of-time library holds: what a lens run on a usual model asks for. Anything else is compiled just in time."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.metal import descriptors
from metalens.ops.metal.formats import Format, all_formats
from metalens.ops.metal.kernel import Kernel

BLOCKS = (32, 64)  # rows of a full tile, by the GPU's generation
FEW = (1, 2, 4, 8)


def usual_formats() -> list[Format]:
    """Dense weights, the 8-bit scaled formats, and affine ones with 16-bit scales in groups of 64; of 4 and 8 bits all groups."""

    def usual(f: Format) -> bool:
        if f.mode != "affine":
            return True
        return f.scales != "float" and (f.group_size == 64 or f.bits in (4, 8))

    return [f for f in all_formats() if usual(f)]


def of_format(f: Format) -> list[Kernel]:
    """The kernels for a head of this format. Rows are float32, as metalens.ops passes them."""
    kernels = [descriptors.lens_stats_few(mx.float32, f, rows) for rows in FEW]
    kernels += [descriptors.lens_stats(mx.float32, f, 16, rounded=False)]
    for rows in BLOCKS:
        for rounded in (False, True):
            kernels += [
                descriptors.lens_stats(mx.float32, f, rows, rounded),
                descriptors.linear(mx.float32, f, rows, rounded, mx.float32),
                descriptors.lens_pullback(mx.float16 if rounded else mx.float32, f, rows),
            ]
    return kernels


def of_all() -> list[Kernel]:
    """The kernels that know no format."""
    return [
        descriptors.lens_stats_merge(),
        descriptors.lens_softmax_grad(mx.float32),
        descriptors.lens_softmax_grad(mx.float16),
        descriptors.norm_grad(),
    ]


def translation_units() -> dict[str, list[Kernel]]:
    """{name of a .metal file: its kernels}."""
    return {"shared": of_all(), **{f.label: of_format(f) for f in usual_formats()}}


def text(kernels: list[Kernel]) -> str:
    """A complete .metal file, which includes the headers of metal/."""
    includes = "".join(f'#include "{header}"\n' for header in sorted({k.header for k in kernels}))
    return includes + "\n" + "\n".join(k.definition for k in kernels)
