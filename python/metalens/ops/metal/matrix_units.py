"""Products of float32 arrays on GPUs with matrix units (M5), where MLX rounds their operands to 11 bits (TF32).

MLX multiplies on the matrix units by itself; metalens's own tiles for them are used only if asked for (`tuning.use_tiles`). Else a product is one of
two kinds:

 * with precision 'bfloat16', which permits rounded operands, the product of MLX at the rate of the matrix units (`linear`, `backward`). They are
   the products of the chunked pipeline around the same kernel for the softmax and its gradient. Operands keep 11 bits, as many as a float16 has.
 * with precision 'float32' the head's products stay on the simdgroup kernels. Dense products, those of translators, go through `matmul`: it splits
   each operand in a number of 11 bits and the rest, of 12 bits at most, so that errors stay those of float32. To split U it would have to be
   dequantized, which costs what it saves.

MLX_ENABLE_TF32=0, set before MLX's first product, keeps MLX's float32 products off the matrix units. Then everything here is a plain product.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx

from metalens.ops.metal import tuning
from metalens.ops.weight import Weight

# Products of fewer rows are bound by reading U. Below 13 rows MLX multiplies a large packed matrix row by row on these GPUs.
FEWEST_ROWS = 13
# Rows from which it pays to dequantize U for the product in the other direction.
FEWEST_ROWS_BACKWARD = 96
MATRIX_UNITS_ARE_FASTER = "plain MLX multiplies rounded operands on this GPU's matrix units"  # why the kernels of lens_stats are not used
PIECE_BYTES = 128 * 2**20  # bytes of rows of U that are dequantized at a time


def round_float32() -> bool:
    """Return whether MLX rounds the operands of float32 products on the GPU that kernels are planned for."""
    return tuning.device().matrix_units and os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def fit(rows: int, rounded: bool) -> bool:
    """Return whether a product of `rows` rows with the head belongs on the matrix units.

    Args:
        rows: rows of the product.
        rounded: whether operands may be rounded to 16 bits.
    """
    return rounded and rows >= FEWEST_ROWS and round_float32()


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """Return the product a b of float32 matrices with errors of float32. Lazy.

    Args:
        a: [N, K] float32.
        b: [K, M] float32.
    """
    return split_product(a, b, mx.matmul) if round_float32() else a @ b


def split_product(a: mx.array, b: mx.array, multiply: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
    """Return a b from three products whose operands have 11 bits. `multiply` may round operands to 11 bits. Lazy.

    With a = a1 + a2 and b = b1 + b2, a b = a1 b1 + (a1 b2 + a2 b1). That omits a2 b2, at most 2^-22 of a term, and what rounding takes from a2 and
    b2, which have up to 12 bits: at most 2^-22 of a and b.
    """
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return multiply(a1, b1) + (multiply(a1, b2) + multiply(a2, b1))


def _halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return (high, low): high is x rounded to 11 significant bits, and high + low is x. If that would not be finite, high is x and low is 0."""
    rounded = ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)
    high = mx.where(mx.isfinite(x) & mx.isfinite(rounded), rounded, x)
    return high, mx.where(mx.isfinite(x), x - high, 0.0)


def linear(x: mx.array, weight: Weight, bias: mx.array | None, scale: float) -> mx.array:
    """Return scale * (x W^T + bias), [N, O] float32, by MLX. Lazy. Arguments as in `matmul.linear`.

    From FEWEST_ROWS rows on, matrix units round operands to 11 bits. MLX multiplies fewer rows without them.
    """
    x = x.astype(mx.float32)
    if weight.scales is None:
        y = x @ weight.values.astype(mx.float32).T
    else:
        y = mx.quantized_matmul(x, weight.values, *_wide(weight), True, weight.group_size, weight.bits, weight.mode)
    y = y if bias is None else y + bias.astype(mx.float32)
    return y if scale == 1.0 else y * scale


def backward(g: mx.array, weight: Weight) -> mx.array:
    """Return g W, [N, I] float32, by MLX. Lazy. The operands are rounded to 11 bits.

    MLX's quantized product in this direction does not use the matrix units, so rows of W are dequantized, a piece at a time.

    Args:
        g: [N, O] float32.
        weight: W [O, I], of a format that the kernels read.
    """
    ids, depth = weight.shape
    step = rows_of_piece(depth)
    scales, biases = (None, None) if weight.scales is None else _wide(weight)
    total = mx.zeros((g.shape[0], depth))
    for first in range(0, ids, step):
        piece = _dequantized(weight, scales, biases, slice(first, first + step))
        (piece,) = mx.depends([piece], [total])  # one piece after the other
        total = total + g[:, first : first + step] @ piece
    return total


def rows_of_piece(depth: int) -> int:
    """Return the rows of U [V, depth] that are dequantized at a time."""
    return max(1, PIECE_BYTES // (4 * depth))


def _wide(weight: Weight) -> tuple[mx.array, mx.array | None]:
    """Return scales and biases in the types with which MLX computes in float32."""
    assert weight.scales is not None
    if weight.mode != "affine":
        return weight.scales, None
    assert weight.biases is not None
    return weight.scales.astype(mx.float32), weight.biases.astype(mx.float32)


def _dequantized(weight: Weight, scales: mx.array | None, biases: mx.array | None, rows: slice) -> mx.array:
    """Return rows of W as float32. `scales` and `biases` are those of `_wide`."""
    if scales is None:
        return weight.values[rows].astype(mx.float32)
    of_rows = weight.values[rows], scales[rows], None if biases is None else biases[rows]
    return mx.dequantize(*of_rows, weight.group_size, weight.bits, weight.mode, dtype=mx.float32)
