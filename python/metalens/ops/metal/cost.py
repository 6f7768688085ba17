"""Formulas for what the kernels multiply, read and write.

The tests compare them with the counts of the emulation (tests/ops/metal/test_traffic.py), and `metalens roofline` turns them into bounds. A matrix
operation is an 8 x 8 x 8 product of a simdgroup, 1024 operations. Bytes are those that cross the memory bus if a dispatch reads every byte that it
needs once from memory; later reads that caches serve are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from metalens.ops.metal import constants, tuning
from metalens.ops.metal.tuning import GpuGeneration

MATRIX_OPERATION = 2 * 8 * 8 * 8  # multiplications and additions


@dataclass(frozen=True)
class Cost:
    """The cost of one or more kernels.

    Attributes:
        matrix_ops: products of 8 x 8 matrices.
        plain_flops: multiplications and additions outside matrix operations.
        bytes: bytes read and written.
    """

    matrix_ops: int = 0
    plain_flops: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """All multiplications and additions."""
        return self.matrix_ops * MATRIX_OPERATION + self.plain_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.matrix_ops + other.matrix_ops, self.plain_flops + other.plain_flops, self.bytes + other.bytes)


def up(n: int, step: int) -> int:
    """Round n up to a multiple of step."""
    return -(-n // step) * step


def weight_bytes(rows: int, columns: int, bits: int, group_size: int, group_bytes: int) -> int:
    """Return the bytes of a packed matrix; `group_bytes` is the size of a group's scale and bias. A dense matrix has group_size 0."""
    return rows * (columns * bits // 8 + (columns // group_size * group_bytes if group_size else 0))


def offset_bytes(vocab: int, with_offset: bool) -> int:
    """Return the bytes of the float32 offset of a head's logits."""
    return 4 * vocab if with_offset else 0


def tile_product(rows: int, ids: int, depth: int) -> int:
    """Return the matrix operations of tiles with whole rows: ids and depth are padded to the tile's size."""
    return rows // 8 * (up(ids, constants.TILE_IDS) // 8) * (up(depth, constants.TILE_DEPTH) // 8)


def lens_stats(
    layers: int, tokens: int, vocab: int, depth: int, head_bytes: int, with_model: bool, generation: GpuGeneration, with_offset: bool = False
) -> Cost:
    """Return the cost of the statistics of L x N rows in one dispatch, without labels.

    No logits are written. The cost counts U and the offset once, which holds if the blocks walk them together; otherwise each block reads them once.
    """
    problem = (layers, tokens) if with_model else (1, layers * tokens)
    blocks = tuning.blocks(*problem, with_model, generation)
    read = 4 * depth * tokens * (layers + int(with_model)) + head_bytes + offset_bytes(vocab, with_offset)
    if blocks.is_vector:
        products = up(vocab, constants.VECTOR_IDS) // 8 * (up(depth, constants.VECTOR_STEP) // 8)
        return Cost(blocks.count * products, 0, read)
    return Cost(blocks.count * tile_product(blocks.rows, vocab, depth), 0, read)


def label_logits(layers: int, tokens: int, with_model: bool, labels: int, depth: int, generation: GpuGeneration) -> Cost:
    """Return the cost of the logits of `labels` labels of each row of lens_stats: a tile of each block, or a matrix, for each label."""
    blocks = tuning.blocks(*((layers, tokens) if with_model else (1, layers * tokens)), with_model, generation)
    if blocks.is_vector:
        return Cost(blocks.count * labels * (up(depth, constants.VECTOR_STEP) // 8))
    return Cost(blocks.count * labels * tile_product(blocks.rows, 1, depth))


def linear(rows: int, columns: int, depth: int, weight: int, generation: GpuGeneration) -> Cost:
    """Return the cost of x W^T for float32 rows, written as float32."""
    block = tuning.matmul_block(rows, generation)
    return Cost(tile_product(up(rows, block), columns, depth), 0, 4 * rows * (depth + columns) + weight)


def softmax_grad(rows: int, tokens: int, vocab: int, gradient_bytes: int, with_offset: bool = False) -> Cost:
    """Return the cost of lens_softmax_grad for a chunk: read once from memory, written once, with its map.

    The cost is a lower bound: by `estimate.kernel_model`, two more passes read memory again where the cache does not hold the rows in flight.
    """
    per_row = vocab * (4 + gradient_bytes) + 4 * -(-vocab // constants.MAP_WIDTH)
    return Cost(0, 0, rows * per_row + tokens * vocab * 4 + offset_bytes(vocab, with_offset))


def lens_compare(rows: int, rows_b: int, vocab: int, depth: int, head_bytes: int, generation: GpuGeneration, with_offset: bool = False) -> Cost:
    """Return the cost of the comparison of two chunks of rows of one head: each chunk of logits is read once from memory."""
    read = 4 * (rows + rows_b) * vocab + offset_bytes(vocab, with_offset)
    products = linear(rows, vocab, depth, head_bytes, generation) + linear(rows_b, vocab, depth, head_bytes, generation)
    return products + Cost(0, 0, read + 16 * rows)


def lens_backward(rows: int, vocab: int, depth: int, weight: int, gradient_bytes: int, generation: GpuGeneration) -> Cost:
    """Return the cost of g U without skipped tiles."""
    block = tuning.matmul_block(rows, generation)
    products = up(rows, block) // 8 * (up(depth, constants.TILE_IDS) // 8) * (up(vocab, constants.MAP_WIDTH) // 8)
    return Cost(products, 0, rows * (vocab * gradient_bytes + 4 * depth) + weight)


def lens_kl(
    layers: int,
    tokens: int,
    vocab: int,
    depth: int,
    head_bytes: int,
    generation: GpuGeneration,
    gradient_bytes: int = 4,
    with_offset: bool = False,
) -> Cost:
    """Return the cost of the loss and its gradient for one chunk of L x N rows."""
    rows = layers * tokens
    return (
        linear(tokens, vocab, depth, head_bytes, generation)
        + linear(rows, vocab, depth, head_bytes, generation)
        + softmax_grad(rows, tokens, vocab, gradient_bytes, with_offset)
        + lens_backward(rows, vocab, depth, head_bytes, gradient_bytes, generation)
    )


def translate_norm(rows: int, depth: int, generation: GpuGeneration) -> Cost:
    """Return the cost of the forward and backward pass for one layer's rows: W h + b, the norm, their gradients. dW is MLX's product."""
    forward = linear(rows, depth, depth, 4 * depth * depth, generation)
    return forward + Cost(0, 2 * rows * depth * depth, 4 * rows * depth * 8 + 4 * depth * depth)
