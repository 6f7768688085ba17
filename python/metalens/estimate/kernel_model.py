"""Predict the fraction of a GPU's float32 peak that a kernel reaches: a model from published instruction costs, not a measurement.

A tile kernel moves on 32 columns at a time. A step costs a simdgroup its matrix products, the dequantization of its part of U, and its use of the
core's threadgroup memory, which four simdgroups share. The model adds the three: threadgroups of a core hide each other's waits, but not each other's
use of a unit. The model is pessimistic for MLX's 4-bit product of float16 rows on an M1 Max, of which 0.74 of the peak was published
(ml-explore/mlx#4216). It is made for comparing designs, and serves both sides of a comparison.

Sources: philipturner/metal-benchmarks (cycles of an instruction for a simdgroup, on M1 and M2; bytes per cycle), and the matrix rates that others
reached since (88 % of the peak on an M3 Ultra in ml-explore/mlx#3196; up to 94 % in metal-flash-attention on M3). That threadgroup memory has 32
banks of 4 bytes is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from metalens.estimate.chips import Chip
from metalens.estimate.roofline import PLAIN_STATS, PLAIN_TRAINING
from metalens.models.facts import ModelDimensions
from metalens.ops.chunks import LOGITS_BYTES
from metalens.ops.metal import constants, kl, tuning
from metalens.ops.metal.matrix_units import FEWEST_ROWS, FEWEST_ROWS_BACKWARD

SCHEDULERS = 4  # of a core; each runs one simdgroup of a threadgroup of four
BANK_BYTES = 128  # bytes that threadgroup memory moves in a cycle
L2_BYTES = 32  # bytes that a core takes from the second-level cache in a cycle
STEP = 32  # columns of a step
SIMD_SUM = 14.5  # cycles of simd_sum
# (rows below which it holds, the largest ratio of a call's time to plain MLX's), over the chips and shapes of tests/estimate/test_kernel_model.py.
# Few rows fill tiles badly, and for the products of fewer than 16 rows MLX has kernels that are as good.
SLOWEST = ((16, 1.3), (250, 1.2), (math.inf, 1.07))
GRAD_CYCLES = 150  # cycles of 32 elements in the three passes of lens_softmax_grad: seven exponentials, and some 100 simple instructions
# Bytes of the last-level cache per core, roughly: 8 MB of an M1, 48 MB of a Max.
CACHE_BYTES = 1.2 * 2**20


@dataclass(frozen=True)
class Design:
    """A way to write the kernels.

    Attributes:
        conflicts: how many times as long as without conflicts a store to threadgroup memory takes.
        dequantize: cycles of a lane for one 4-bit weight.
        epilogue: cycles of a simdgroup for the statistics of 32 ids of a row.
        merge: cycles of a simdgroup to merge the lanes' states of a row, once for each split.
        labels_per_split: whether each split multiplies the labels' rows of U again.
        counted_cores: whether the vocabulary is split for the cores that there are, in three waves. False = for the fewest cores sold under the
            GPU's letter, one wave.
        vector_uses_matrices: whether a kernel of few rows multiplies with matrix instructions. False = with sums over the lanes for every id.
        grad_simdgroups: simdgroups of a row of lens_softmax_grad.
    """

    conflicts: int
    dequantize: float
    epilogue: float
    merge: float
    labels_per_split: bool
    counted_cores: bool
    vector_uses_matrices: bool
    grad_simdgroups: int


FIRST = Design(4, 9, 270, 0, True, False, False, 8)  # scalar stores, shift and convert, nine reductions for 32 ids
NOW = Design(1, 4.5, 70, 133, False, True, True, 16)


@dataclass(frozen=True)
class Tile:
    """A tile product: rows x ids of a threadgroup, and of each of its four simdgroups."""

    rows: int
    ids: int
    simd_rows: int
    simd_ids: int

    def step_cycles(self, chip: Chip, design: Design, operand_bytes: int = 4) -> float:
        """Return the cycles that a core spends on STEP columns of one threadgroup."""
        fragments = self.simd_rows // 8, self.simd_ids // 8
        products = math.prod(fragments) * STEP // 8 * chip.product_cycles
        stored = (self.rows + self.ids) * STEP * operand_bytes * design.conflicts
        loaded = 4 * sum(fragments) * STEP // 8 * 64 * operand_bytes
        return products + self.ids * STEP / 128 * design.dequantize + (stored + loaded) / BANK_BYTES


def our_tile(rows: int) -> Tile:
    """Return the tile of metal/tile.h: simdgroups divide the ids."""
    return Tile(rows, constants.TILE_IDS, rows, constants.TILE_IDS // 4)


MLX_TILE = Tile(32, 32, 16, 16)  # of mx.quantized_matmul


def mlx_in_float16(chip: Chip) -> float:
    """Return the part of the peak that the model gives MLX's 4-bit product of many float16 rows, to compare with what was published."""
    tile, design = MLX_TILE, NOW
    return tile.rows * tile.ids * STEP / (128 * tile.step_cycles(chip, design, operand_bytes=2))


def fill(groups: int, chip: Chip) -> float:
    """Return the fraction of the GPU that `groups` equal threadgroups of four simdgroups keep busy.

    Each core runs four at once; the last of them to finish leave half a wave idle. If a core has fewer than four, it waits: two threadgroups do 0.7
    of the work that four do in the same time.
    """
    slots = 4 * chip.cores
    if groups >= slots:
        return groups / (groups + slots / 2)
    of_core = math.ceil(groups / chip.cores)
    return groups / (of_core * chip.cores) * math.sqrt(of_core / 4) * 2 / 3


def product(rows: int, ids: int, depth: int, weight_bytes: float, chip: Chip, design: Design, tile: Tile | None = None, splits: int = 1) -> float:
    """Return the seconds of x U^T for rows x, written as float32.

    Args:
        rows, ids, depth: sizes of the product.
        weight_bytes: bytes of U.
        chip: the GPU.
        design: the kernel's design.
        tile: the kernel's tile; None = that of metalens.
        splits: parts of the reduction, which are written and added.
    """
    tile = tile or our_tile(tuning.matmul_block(rows, chip.family))
    groups = math.ceil(rows / tile.rows) * math.ceil(ids / tile.ids) * splits
    cycles = groups / chip.cores * depth / splits / STEP * tile.step_cycles(chip, design)
    added = 0 if splits == 1 else 2 * splits
    return max(cycles / chip.clock / fill(groups, chip), (weight_bytes + 4 * rows * (depth + ids)) / chip.bytes_per_second) + (
        4 * rows * ids * added / chip.bytes_per_second
    )


def backward(rows: int, ids: int, depth: int, head_bytes: float, chip: Chip, design: Design) -> float:
    """Return the seconds of g U without skipped tiles: a product that sums over the vocabulary, which is split."""
    tile = our_tile(tuning.matmul_block(rows, chip.family))
    groups = math.ceil(rows / tile.rows) * math.ceil(depth / tile.ids)
    if design.counted_cores:
        splits = tuning.split_vocab(ids, constants.MAP_WIDTH, groups, chip.device)[1]
    else:
        splits = math.ceil(4 * tuning.CORES[chip.letter][0] / groups)
    return product(rows, depth, ids, head_bytes, chip, design, tile, splits)


def lens_stats(layers: int, tokens: int, ids: int, depth: int, head_bytes: float, chip: Chip, design: Design = NOW, labels: bool = True) -> float:
    """Return the seconds of the statistics of L x N rows beside the model's."""
    blocks = tuning.blocks(layers, tokens, True, chip.family)
    if blocks.is_vector:
        return blocks.count * _vector(blocks.rows, ids, depth, head_bytes, chip, design)
    tile = our_tile(blocks.rows)
    if design.counted_cores:
        ids_per_split, splits = tuning.split_vocab(ids, tile.ids, blocks.count, chip.device, whole_steps=tuning.WHOLE_TILES)
    else:
        tiles = -(-ids // tile.ids)
        wanted = min(tiles, -(-4 * tuning.CORES[chip.letter][0] // blocks.count))
        ids_per_split = -(-tiles // wanted) * tile.ids
        splits = -(-ids // ids_per_split)
    step = tile.step_cycles(chip, design) * math.ceil(depth / STEP)
    tiles_of_split = ids_per_split / tile.ids
    of_group = tiles_of_split * (step + tile.rows / 4 * tile.ids / 32 * design.epilogue) + tile.rows / 4 * design.merge
    groups = blocks.count * splits
    busy = groups / chip.cores * (of_group + labels * design.labels_per_split * step) / fill(groups, chip)
    of_labels = blocks.count / chip.cores * step / fill(blocks.count, chip) if labels and not design.labels_per_split else 0.0
    read = head_bytes + 4 * depth * tokens * (layers + 1)
    return max((busy + of_labels) / chip.clock, read / chip.bytes_per_second)


def _vector(rows: int, ids: int, depth: int, head_bytes: float, chip: Chip, design: Design) -> float:
    """Return the seconds of lens_stats_vector: bound by reading U, by instructions, or by reading the rows again from the second-level cache."""
    if design.vector_uses_matrices:
        simdgroups = constants.VECTOR_SIMDS
        groups = tuning.split_vocab(ids, constants.VECTOR_IDS * simdgroups, 1, chip.device, simdgroups)[1]
        of_four = groups * simdgroups // 4  # threadgroups, if they had four simdgroups
        of_ids = ids * depth * (chip.product_cycles / 64 + design.dequantize / 32) + ids * rows / 32 * design.epilogue
        again = 4.0 * rows * depth * groups
    else:
        of_four = groups = tuning.CORES[chip.letter][0]
        of_ids = ids * depth / 32 * (rows + design.dequantize) + ids * rows * SIMD_SUM + ids / 4 * rows * 100
        again = 1.0 * rows * depth * ids
    used = chip.cores * fill(of_four, chip)
    cycles = max(of_ids / SCHEDULERS, again / L2_BYTES) / used
    return max(cycles / chip.clock, head_bytes / (chip.bytes_per_second * min(1.0, of_four / (2 * chip.cores))))


def softmax_grad(rows: int, tokens: int, ids: int, chip: Chip, design: Design = NOW, gradient_bytes: int = 4) -> float:
    """Return the seconds of lens_softmax_grad for a chunk: rows that the cache does not hold until their last pass are read three times."""
    in_flight = max(1, tuning.SIMDGROUPS_PER_CORE // design.grad_simdgroups) * chip.cores
    passes = 1 if in_flight * 4 * ids <= CACHE_BYTES * chip.cores else 3
    moved = rows * ids * (4 * passes + gradient_bytes) + 4 * tokens * ids
    cycles = rows * ids / 32 * GRAD_CYCLES / SCHEDULERS / chip.cores
    return max(cycles / chip.clock, moved / chip.bytes_per_second)


def lens_kl(layers: int, tokens: int, ids: int, depth: int, head_bytes: float, chip: Chip, design: Design = NOW, rounded: bool = False) -> float:
    """Return the seconds of the loss and its gradient for L x N rows: chunks of two products around lens_softmax_grad."""
    with tuning.planned_for(chip.device):
        per_layers, per_tokens, of_model = kl.chunk_shape(layers, tokens, ids, depth, rounded)
    gradient_bytes = 2 if rounded and not chip.matrix_tflops else 4
    head = ids, depth, head_bytes, chip
    if not design.counted_cores:
        of_model = per_tokens

    def of_product(rows: int) -> float:
        on_units = rounded and chip.matrix_tflops and rows >= FEWEST_ROWS
        return mlx_product(rows, *head, rounded) if on_units else product(rows, *head, design)

    def of_chunk(rows: int, tokens: int) -> float:
        units = rounded and chip.matrix_tflops and rows >= FEWEST_ROWS_BACKWARD
        back = mlx_backward(rows, *head, rounded) if units else backward(rows, *head, design)
        return of_product(rows) + softmax_grad(rows, tokens, ids, chip, design, gradient_bytes) + back

    seconds = math.fsum(count * of_product(size) for size, count in _parts(tokens, of_model))
    for of_layers, times in _parts(layers, per_layers):
        seconds += sum(times * count * of_chunk(of_layers * size, size) for size, count in _parts(tokens, per_tokens))
    return seconds


def _parts(total: int, most: int) -> list[tuple[int, int]]:
    """Return (size, how many) of the parts of `total`: as many whole ones as there are, and the rest."""
    parts = [(most, total // most), (total % most, 1)]
    return [(size, count) for size, count in parts if size and count]


# ------------------------------------------------------------------ plain MLX


def mlx_product(rows: int, ids: int, depth: int, weight_bytes: float, chip: Chip, rounded: bool = False) -> float:
    """Return the seconds of mx.quantized_matmul for float32 rows: on matrix units if operands may be rounded (TF32), else not (MLX_ENABLE_TF32=0)."""
    if rows < chip.vector_limit:
        return math.ceil(rows / 5) * weight_bytes / chip.bytes_per_second  # each matrix-vector product of five rows reads U
    if rounded and chip.matrix_tflops:
        moved = weight_bytes + 4 * rows * (depth + ids)
        return max(2 * math.ceil(rows / 32) * 32 * ids * depth / chip.flops_in_16_bits, moved / chip.bytes_per_second)
    return product(rows, ids, depth, weight_bytes, chip, NOW, MLX_TILE)


def mlx_backward(rows: int, ids: int, depth: int, weight_bytes: float, chip: Chip, rounded: bool = False) -> float:
    """Return the seconds of g U: on matrix units with rows of U that are dequantized first, because MLX has no quantized product for it there."""
    if not (rounded and chip.matrix_tflops):
        return product(rows, depth, ids, weight_bytes, chip, NOW, MLX_TILE)
    moved = weight_bytes + 3 * 4 * ids * depth + 4 * rows * (depth + ids)
    return max(2 * rows * ids * depth / chip.flops_in_16_bits, moved / chip.bytes_per_second)


def plain_stats(layers: int, tokens: int, ids: int, depth: int, head_bytes: float, chip: Chip, rounded: bool = False) -> float:
    """Return the seconds of the statistics in plain MLX, in the chunks of ops/chunks.py: products, and kernels over logits in memory."""
    head = ids, depth, head_bytes, chip, rounded
    return sum(
        count * (mlx_product(layers * size, *head) + mlx_product(size, *head) + layers * size * ids * PLAIN_STATS / chip.bytes_per_second)
        for size, count in _plain_parts(layers, tokens, ids)
    )


def plain_kl(layers: int, tokens: int, ids: int, depth: int, head_bytes: float, chip: Chip, rounded: bool = False) -> float:
    """Return the seconds of the loss and its gradient in plain MLX: as the statistics, and a second product."""
    head = ids, depth, head_bytes, chip, rounded
    return sum(
        count
        * (
            mlx_product(layers * size, *head)
            + mlx_product(size, *head)
            + product(layers * size, depth, ids, head_bytes, chip, NOW, MLX_TILE)  # MLX has no quantized product for it on matrix units
            + layers * size * ids * PLAIN_TRAINING / chip.bytes_per_second
        )
        for size, count in _plain_parts(layers, tokens, ids)
    )


def _plain_parts(layers: int, tokens: int, ids: int) -> list[tuple[int, int]]:
    return _parts(tokens, max(1, LOGITS_BYTES[mx.DeviceType.gpu] // (4 * ids * layers)))


# ------------------------------------------------------------------ a table


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
    layers, ids, depth, head = model.num_layers, model.vocab_size, model.hidden_size, model.head_bytes
    rows = min(layers * tokens, tuning.chunk_rows(ids, depth, 4, chip.device))

    def of(flops: float, seconds: Callable[[Design], float], plain: float) -> Fraction:
        peak = chip.tflops * 1e12
        return Fraction(flops / seconds(FIRST) / peak, flops / seconds(NOW) / peak, flops / plain / peak)

    one, many = 2.0 * ids * depth * layers, 2.0 * ids * depth * layers * tokens
    product_of_chunk = 2.0 * rows * ids * depth
    return {
        "lens_stats": of(many, lambda d: lens_stats(layers, tokens, ids, depth, head, chip, d), plain_stats(layers, tokens, ids, depth, head, chip)),
        "lens_stats_one_token": of(one, lambda d: lens_stats(layers, 1, ids, depth, head, chip, d), plain_stats(layers, 1, ids, depth, head, chip)),
        "linear": of(product_of_chunk, lambda d: product(rows, ids, depth, head, chip, d), mlx_product(rows, ids, depth, head, chip)),
        "lens_backward": of(product_of_chunk, lambda d: backward(rows, ids, depth, head, chip, d), mlx_backward(rows, ids, depth, head, chip)),
        "lens_kl": of(2 * many, lambda d: lens_kl(layers, tokens, ids, depth, head, chip, d), plain_kl(layers, tokens, ids, depth, head, chip)),
    }
