"""What the kernels multiply, read and write, as formulas.

The tests hold them against what the emulation counts (tests/metal/test_traffic.py), and `metalens roofline` turns them into bounds. Matrix operations
are 8 x 8 x 8 products of a simdgroup, 1024 operations each. Bytes are those that must cross the memory's bus if every byte of an array that a
dispatch touches comes from there once; what caches then serve is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from metalens.ops.metal import tuning
from metalens.ops.metal.descriptors import MAP_WIDTH
from metalens.ops.metal.tuning import TILE_DEPTH, TILE_IDS, Family

MATRIX_OPERATION = 2 * 8 * 8 * 8  # multiplications and additions


@dataclass(frozen=True)
class Cost:
    """Of some kernels.

    Attributes:
        matrix_ops: products of 8 x 8 matrices.
        plain_flops: multiplications and additions outside of matrices.
        bytes: read and written.
    """

    matrix_ops: int = 0
    plain_flops: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """All of them."""
        return self.matrix_ops * MATRIX_OPERATION + self.plain_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.matrix_ops + other.matrix_ops, self.plain_flops + other.plain_flops, self.bytes + other.bytes)


def up(n: int, step: int) -> int:
    """N rounded up to whole steps."""
    return -(-n // step) * step


def weight_bytes(rows: int, columns: int, bits: int, group_size: int, group_bytes: int) -> int:
    """Of a packed matrix; `group_bytes` are a group's scale and bias. A dense one has group_size 0."""
    return rows * (columns * bits // 8 + (columns // group_size * group_bytes if group_size else 0))


def tile_product(rows: int, ids: int, depth: int) -> int:
    """Matrix operations of tiles of whole rows: ids and depth are padded to the tile's."""
    return rows // 8 * (up(ids, TILE_IDS) // 8) * (up(depth, TILE_DEPTH) // 8)


def lens_stats(layers: int, tokens: int, vocab: int, depth: int, head_bytes: int, with_model: bool, family: Family) -> Cost:
    """Statistics of L x N rows in one dispatch, without labels: no logits, U once per dispatch if the blocks keep step, else once per block."""
    problem = (layers, tokens) if with_model else (1, layers * tokens)
    blocks = tuning.blocks(*problem, with_model, family)
    rows = 4 * depth * tokens * (layers + int(with_model))
    if blocks.few:
        return Cost(0, 2 * blocks.rows * vocab * depth, rows + head_bytes)
    return Cost(blocks.count * tile_product(blocks.rows, vocab, depth), 0, rows + head_bytes)


def linear(rows: int, columns: int, depth: int, weight: int, family: Family) -> Cost:
    """x W^T of float32 rows, written as float32."""
    block = tuning.plain_block(rows, family)
    return Cost(tile_product(up(rows, block), columns, depth), 0, 4 * rows * (depth + columns) + weight)


def softmax_grad(rows: int, tokens: int, vocab: int, gradient_bytes: int) -> Cost:
    """Of a chunk: read once from memory (two more passes over a row find it in the cache), written once, with its map."""
    per_row = vocab * (4 + gradient_bytes) + 4 * -(-vocab // MAP_WIDTH)
    return Cost(0, 0, rows * per_row + tokens * vocab * 4)


def pullback(rows: int, vocab: int, depth: int, weight: int, gradient_bytes: int, family: Family) -> Cost:
    """g U with nothing left out."""
    block = tuning.plain_block(rows, family)
    products = up(rows, block) // 8 * (up(depth, TILE_IDS) // 8) * (up(vocab, MAP_WIDTH) // 8)
    return Cost(products, 0, rows * (vocab * gradient_bytes + 4 * depth) + weight)


def lens_kl(layers: int, tokens: int, vocab: int, depth: int, head_bytes: int, family: Family, gradient_bytes: int = 4) -> Cost:
    """The loss and its gradient for one chunk of L x N rows."""
    rows = layers * tokens
    return (
        linear(tokens, vocab, depth, head_bytes, family)
        + linear(rows, vocab, depth, head_bytes, family)
        + softmax_grad(rows, tokens, vocab, gradient_bytes)
        + pullback(rows, vocab, depth, head_bytes, gradient_bytes, family)
    )


def translate_norm(rows: int, depth: int, family: Family) -> Cost:
    """Forward and backward for one layer's rows: W h + b, the norm, their gradients; dW is MLX's product."""
    forward = linear(rows, depth, depth, 4 * depth * depth, family)
    return forward + Cost(0, 2 * rows * depth * depth, 4 * rows * depth * 8 + 4 * depth * depth)
