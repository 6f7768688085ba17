"""The product with a matrix on the GPU: a chunk's logits, and translators."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.metal import constants, descriptors, tuning
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import launch
from metalens.ops.metal.source import pack
from metalens.ops.weight import Weight


def linear(x: mx.array, weight: Weight, bias: mx.array | None, scale: float, rounded: bool) -> mx.array:
    """Return scale * (x W^T + bias), [N, O] float32. Lazy.

    Args:
        x: [N, I], any float type.
        weight: W [O, I], of a format that the kernels read.
        bias: [O] or None.
        scale: the factor of the sum.
        rounded: whether operands may be rounded to half.
    """
    rows, depth = x.shape
    columns, gpu = weight.shape[0], tuning.device()
    block = tuning.matmul_block(rows, gpu.generation)
    problem = {"rows": rows, "depth": depth, "columns": columns, "with_bias": int(bias is not None), "scale": scale}
    (y,) = launch(
        descriptors.linear(x.dtype, format_of(weight), block, rounded, mx.float32),
        [
            x,
            *arrays(weight),
            mx.zeros(8) if bias is None else bias.astype(mx.float32),
            mx.array(pack("linear.h", "LinearProblem", problem)),
        ],
        (-(-rows // block), -(-columns // constants.TILE_IDS), 1),
        [(rows, columns)],
        [mx.float32],
    )
    return y
