"""The product with a matrix on the GPU: a chunk's logits, and translators."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.metal import constants, descriptors, matrix_units, speed, tuning
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import absent, launch
from metalens.ops.metal.source import pack
from metalens.ops.metal.speed import Matrix
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
    rows = x.shape[0]
    if matrix_units.fit(rows, rounded) or speed.mlx_multiplies_faster(rows, Matrix.of(weight)):
        return matrix_units.linear(x, weight, bias, scale)
    if weight.scales is None and weight.values.dtype == mx.float32:
        return _dense(x.astype(mx.float32), weight.values, bias, scale)
    return tile_linear(x, weight, bias, scale, rounded)


def tile_linear(x: mx.array, weight: Weight, bias: mx.array | None, scale: float, rounded: bool) -> mx.array:
    """Return the same by our kernel, for any number of rows. Lazy."""
    (rows, depth), columns = x.shape, weight.shape[0]
    gpu = tuning.device()
    block = tuning.matmul_block(rows, gpu.generation)
    problem = {"rows": rows, "depth": depth, "columns": columns, "with_bias": int(bias is not None), "scale": scale}
    (y,) = launch(
        descriptors.linear(x.dtype, format_of(weight), block, rounded, gpu.tensor_tiles),
        [
            x,
            *arrays(weight),
            absent() if bias is None else bias.astype(mx.float32),
            mx.array(pack("linear.h", "LinearProblem", problem)),
        ],
        (-(-rows // block), -(-columns // constants.TILE_IDS), 1),
        [(rows, columns)],
        [mx.float32],
    )
    return y


def _dense(x: mx.array, w: mx.array, bias: mx.array | None, scale: float) -> mx.array:
    """Return scale * (x W^T + bias) of float32 arrays, by MLX: a dense matrix needs no conversion, and MLX's product has larger tiles than ours.

    W of 16 bits stays with our kernel, because MLX would first write a copy of it in float32.
    """
    if bias is not None and not matrix_units.round_float32():
        return mx.addmm(bias.astype(mx.float32), x, w.T, alpha=scale, beta=scale)
    y = matrix_units.matmul(x, w.T)
    y = y if bias is None else y + bias.astype(mx.float32)
    return y if scale == 1.0 else y * scale
