"""Predict the fraction of a GPU's float32 peak that a kernel reaches: tables of the model in ops/metal/speed.py, not a measurement.

The training pipeline is added here: products of chunks around lens_softmax_grad, and the same in plain MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from metalens.estimate.chips import Chip
from metalens.estimate.roofline import PLAIN_TRAINING
from metalens.models.facts import ModelDimensions
from metalens.ops.metal import constants, kl, tuning
from metalens.ops.metal.matrix_units import FEWEST_ROWS, FEWEST_ROWS_BACKWARD
from metalens.ops.metal.speed import (
    MLX_TILE,
    NOW,
    SCHEDULERS,
    STEP,
    Asked,
    Design,
    Matrix,
    Rates,
    lens_stats,
    mlx_product,
    our_tile,
    parts,
    plain_parts,
    plain_stats,
    product,
)

GRAD_CYCLES = 150  # cycles of 32 elements in the three passes of lens_softmax_grad: seven exponentials, and some 100 simple instructions
# Bytes of the last-level cache per core, roughly: 8 MB of an M1, 48 MB of a Max.
CACHE_BYTES = 1.2 * 2**20

FIRST = Design(4, 9, 270, 0, True, False, False, 8)  # scalar stores, shift and convert, nine reductions for 32 ids


def head_of(model: ModelDimensions) -> Matrix:
    """Return the sizes of a model's unembedding."""
    return kl.HeadSizes(model.vocab_size, model.hidden_size, model.bits, model.group_size).matrix


def mlx_in_float16(gpu: Rates) -> float:
    """Return the part of the peak that the model gives MLX's 4-bit product of many float16 rows, to compare with what was published."""
    tile, design = MLX_TILE, NOW
    return tile.rows * tile.ids * STEP / (128 * tile.step_cycles(gpu, design, operand_bytes=2))


def backward(rows: int, matrix: Matrix, gpu: Rates, design: Design) -> float:
    """Return the seconds of g U without skipped tiles: a product that sums over the vocabulary, which is split."""
    tile = our_tile(tuning.matmul_block(rows, gpu.family), replace(gpu.family, tensor_tiles=False))  # this kernel has no other
    groups = math.ceil(rows / tile.rows) * math.ceil(matrix.depth / tile.ids)
    if design.counted_cores:
        splits = tuning.split_vocab(matrix.ids, constants.MAP_WIDTH, groups, gpu.device)[1]
    else:
        splits = math.ceil(4 * tuning.CORES[gpu.device.architecture[-1]][0] / groups)
    return product(rows, matrix.depth, matrix.ids, matrix.stored, gpu, design, tile, splits)


def softmax_grad(rows: int, tokens: int, ids: int, gpu: Rates, design: Design = NOW, gradient_bytes: int = 4) -> float:
    """Return the seconds of lens_softmax_grad for a chunk: rows that the cache does not hold until their last pass are read three times."""
    in_flight = max(1, tuning.SIMDGROUPS_PER_CORE // design.grad_simdgroups) * gpu.cores
    passes = 1 if in_flight * 4 * ids <= CACHE_BYTES * gpu.cores else 3
    moved = rows * ids * (4 * passes + gradient_bytes) + 4 * tokens * ids
    cycles = rows * ids / 32 * GRAD_CYCLES / SCHEDULERS / gpu.cores
    return max(cycles / gpu.clock, moved / gpu.bytes_per_second)


def lens_kl(layers: int, tokens: int, matrix: Matrix, gpu: Rates, design: Design = NOW, rounded: bool = False) -> float:
    """Return the seconds of the loss and its gradient for L x N rows: chunks of two products around lens_softmax_grad."""
    ids, depth = matrix.ids, matrix.depth
    with tuning.planned_for(gpu.device):
        per_layers, per_tokens, of_model = kl.chunk_shape(layers, tokens, ids, depth, rounded)
    on_units = rounded and gpu.matrix_flops > 0
    gradient_bytes = 2 if rounded and not on_units else 4
    if not design.counted_cores:
        of_model = per_tokens

    def of_product(rows: int) -> float:
        ours, plain = product(rows, ids, depth, matrix.stored, gpu, design), mlx_product(rows, matrix, gpu, rounded)
        if on_units and rows >= FEWEST_ROWS:
            return plain
        return min(ours, plain) if design is NOW and rows < gpu.vector_limit else ours

    def of_chunk(rows: int, tokens: int) -> float:
        units = on_units and rows >= FEWEST_ROWS_BACKWARD
        back = mlx_backward(rows, matrix, gpu, rounded) if units else backward(rows, matrix, gpu, design)
        return of_product(rows) + softmax_grad(rows, tokens, ids, gpu, design, gradient_bytes) + back

    return _in_chunks(layers, tokens, (per_layers, per_tokens, of_model), of_product, of_chunk)


def _in_chunks(
    layers: int, tokens: int, shape: tuple[int, int, int], of_model: Callable[[int], float], of_chunk: Callable[[int, int], float]
) -> float:
    """Add up the seconds of `kl.in_chunks`: those of the model's rows, and of chunks by their rows and tokens."""
    per_layers, per_tokens, together = shape
    seconds = math.fsum(count * of_model(size) for size, count in parts(tokens, together))
    for of_layers, times in parts(layers, per_layers):
        seconds += sum(times * count * of_chunk(of_layers * size, size) for size, count in parts(tokens, per_tokens))
    return seconds


def lens_compare(layers: int, tokens: int, matrix: Matrix, gpu: Rates) -> float:
    """Return the seconds of the comparison of L x N rows with one row of each token, in float32."""
    ids, depth = matrix.ids, matrix.depth
    with tuning.planned_for(gpu.device):
        shape = kl.chunk_shape(layers, tokens, ids, depth, False)

    def of_product(rows: int) -> float:
        ours = product(rows, ids, depth, matrix.stored, gpu, NOW)
        return min(ours, mlx_product(rows, matrix, gpu)) if rows < gpu.vector_limit else ours

    def of_chunk(rows: int, tokens: int) -> float:
        return of_product(rows) + softmax_grad(rows, tokens, ids, gpu, gradient_bytes=0)  # as many cycles, by the same count

    return _in_chunks(layers, tokens, shape, of_product, of_chunk)


def mlx_backward(rows: int, matrix: Matrix, gpu: Rates, rounded: bool = False) -> float:
    """Return the seconds of g U: on matrix units with rows of U that are dequantized first, because MLX has no quantized product for it there."""
    ids, depth = matrix.ids, matrix.depth
    if not (rounded and gpu.matrix_flops):
        return matrix.widened / gpu.bytes_per_second + product(rows, depth, ids, matrix.stored, gpu, NOW, MLX_TILE)
    moved = matrix.stored + 3 * 4 * ids * depth + 4 * rows * (depth + ids)
    return max(2 * rows * ids * depth / gpu.matrix_flops, moved / gpu.bytes_per_second)


def plain_kl(layers: int, tokens: int, matrix: Matrix, gpu: Rates, rounded: bool = False) -> float:
    """Return the seconds of the loss and its gradient in plain MLX: as the statistics, and a second product."""

    def of_chunk(tokens: int) -> float:
        rows = layers * tokens
        products = mlx_product(rows, matrix, gpu, rounded) + mlx_product(tokens, matrix, gpu, rounded)
        back = mlx_backward(rows, matrix, gpu)  # MLX has no quantized product for it on matrix units
        return products + back + rows * matrix.ids * PLAIN_TRAINING / gpu.bytes_per_second

    return sum(count * of_chunk(size) for size, count in plain_parts(layers, tokens, matrix.ids))


def plain_compare(layers: int, tokens: int, matrix: Matrix, gpu: Rates) -> float:
    """Return the seconds of the comparison in plain MLX, in float32.

    Arrays of float32 for each pair of logits: both are written, and read for their log-sum-exp. A KL divergence reads two, writes terms and adds
    them; there are two, and two more with the mean prediction, which is made of two. The total variation reads two, writes terms and adds them.
    """
    arrays = 2 + 2 + 2 * 4 + 3 + 2 * 4 + 4
    of_rows = 4 * arrays * matrix.ids / gpu.bytes_per_second
    return sum(
        count * (mlx_product(layers * size, matrix, gpu) + mlx_product(size, matrix, gpu) + layers * size * of_rows)
        for size, count in plain_parts(layers, tokens, 2 * matrix.ids)
    )


def with_tensor_tiles(gpu: Rates) -> Rates:
    """Return a GPU with matrix units on which the kernels multiply tiles with them (`tuning.use_tiles`)."""
    return replace(gpu, device=replace(gpu.device, tensor_tiles=True))


# ------------------------------------------------------------------ a table


def tensor_speedups(model: ModelDimensions, chip: Chip, tokens: int) -> dict[str, float]:
    """Predict the time with simdgroup matrices divided by that with tiles of tensor operations, by kernel, in float32.

    Args:
        model: sizes of the model.
        chip: a GPU with matrix units.
        tokens: tokens of a batch.
    """
    layers, head, gpu = model.num_layers, head_of(model), chip.rates
    rows = min(layers * tokens, tuning.chunk_rows(head.ids, head.depth, 4, chip.device))

    def statistics(gpu: Rates) -> float:
        return lens_stats(Asked(layers, tokens), head, gpu)

    def chunk(gpu: Rates) -> float:
        return product(rows, head.ids, head.depth, head.stored, gpu, NOW)

    return {name: of(gpu) / of(with_tensor_tiles(gpu)) for name, of in (("lens_stats", statistics), ("linear", chunk))}


@dataclass(frozen=True)
class Fraction:
    """The part of a chip's float32 peak that the useful operations of a kernel reach: with FIRST, with NOW, and for the same in plain MLX."""

    first: float
    now: float
    plain_mlx: float


def fractions(model: ModelDimensions, chip: Chip, tokens: int) -> dict[str, Fraction]:
    """Predict the fractions of the chip's float32 peak for the kernels, by name, in float32. `lens_stats_one_token` is of a batch of one token.

    Args:
        model: sizes of the model.
        chip: the GPU.
        tokens: tokens of a batch.
    """
    layers, head, gpu = model.num_layers, head_of(model), chip.rates
    ids, depth = head.ids, head.depth
    rows = min(layers * tokens, tuning.chunk_rows(ids, depth, 4, chip.device))

    def of(flops: float, seconds: Callable[[Design], float], plain: float) -> Fraction:
        peak = chip.tflops * 1e12
        return Fraction(flops / seconds(FIRST) / peak, flops / seconds(NOW) / peak, flops / plain / peak)

    def statistics(tokens: int) -> Fraction:
        asked = Asked(layers, tokens)
        return of(2.0 * ids * depth * layers * tokens, lambda d: lens_stats(asked, head, gpu, d), plain_stats(asked, head, gpu))

    of_chunk, of_loss = 2.0 * rows * ids * depth, 4.0 * ids * depth * layers * tokens
    return {
        "lens_stats": statistics(tokens),
        "lens_stats_one_token": statistics(1),
        "linear": of(of_chunk, lambda d: product(rows, ids, depth, head.stored, gpu, d), mlx_product(rows, head, gpu)),
        "lens_backward": of(of_chunk, lambda d: backward(rows, head, gpu, d), mlx_backward(rows, head, gpu)),
        "lens_kl": of(of_loss, lambda d: lens_kl(layers, tokens, head, gpu, d), plain_kl(layers, tokens, head, gpu)),
    }
