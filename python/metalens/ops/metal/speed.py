"""Predict how long products and statistics take on a GPU, here and in plain MLX: a model from published instruction costs, not a measurement.

Backend 'auto' computes the statistics in plain MLX, and `matmul.linear` multiplies few rows with MLX's product, if that takes less time by the model.
`estimate/kernel_model.py` makes tables of it.

A tile kernel moves on 32 columns at a time. A step costs a simdgroup its matrix products, the dequantization of its part of U, and its use of the
core's threadgroup memory, which four simdgroups share. The model adds the three: threadgroups of a core hide each other's waits, but not each other's
use of a unit. The model is pessimistic for MLX's 4-bit product of float16 rows on an M1 Max, of which 0.74 of the peak was published
(ml-explore/mlx#4216). It is made for comparing designs, and serves both sides of a comparison.

Sources: philipturner/metal-benchmarks (cycles of an instruction for a simdgroup, on M1 and M2; bytes per cycle), and the matrix rates that others
reached since (`tuning.GENERATIONS`). That threadgroup memory has 32 banks of 4 bytes is an assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metalens.ops.chunks import LOGITS_BYTES
from metalens.ops.metal import constants, tuning
from metalens.ops.metal.matrix_units import FEWEST_ROWS, round_float32
from metalens.ops.weight import Weight

PLAIN_IS_FASTER = "plain MLX is faster for rows of this shape on this GPU, by a model"  # why 'auto' does not use the kernels of lens_stats

SCHEDULERS = 4  # of a core; each runs one simdgroup of a threadgroup of four
BANK_BYTES = 128  # bytes that threadgroup memory moves in a cycle
L2_BYTES = 32  # bytes that a core takes from the second-level cache in a cycle
STEP = 32  # columns of a step
REDUCTION = 14.5  # cycles of a sum over a simdgroup
# Cycles of a lane to divide a number into one or two halves: the largest of a row, a sum, a product, conversions, the rest.
SPLIT_CYCLES = {1: 5, 2: 8}
APPLY_CYCLES = 5  # of a lane for an element of a step of tensor operations: zero it, three products with its factors, a sum
COUNT_CYCLES = 15  # cycles of a simdgroup to compare 32 logits with a label: a load, the logit again, a comparison, a sum


@dataclass(frozen=True)
class Rates:
    """What the model needs of a GPU.

    Attributes:
        device: the GPU as kernels are planned for it.
        cores: number of cores.
        clock: cycles per second.
        bytes_per_second: of the memory.
        matrix_flops: operations per second of matrix units with 16-bit operands. 0 = there are none.
    """

    device: tuning.Device
    cores: int
    clock: float
    bytes_per_second: float
    matrix_flops: float = 0.0

    @property
    def family(self) -> tuning.GpuGeneration:
        """The tuning of this generation."""
        return self.device.generation

    @property
    def product_cycles(self) -> float:
        """Cycles of a simdgroup for a product of 8 x 8 matrices."""
        return self.family.product_cycles

    @property
    def vector_limit(self) -> int:
        """The rows from which MLX multiplies a large packed head as a matrix, not row by row (0.32: get_qmv_batch_limit in quantized.cpp)."""
        if self.device.architecture.endswith("d"):
            return 12
        return 13 if self.family.number >= 15 else 6


def rates_of(device: tuning.Device) -> Rates:
    """Return the rates of a GPU by its generation and its cores."""
    family = device.generation
    # 1024 operations of matrix units per core and clock (estimate/chips.py)
    return Rates(device, device.cores, family.clock, family.core_bandwidth * device.cores, 1024 * family.clock * device.cores * device.matrix_units)


@dataclass(frozen=True)
class Matrix:
    """A stored matrix U [ids, depth].

    Attributes:
        ids, depth: its shape.
        stored: bytes of it.
        widened: bytes more that MLX moves in a product with float32 rows, because it first makes 16-bit scales, or a dense matrix, float32.
        packed: whether it is quantized.
    """

    ids: int
    depth: int
    stored: int
    widened: int = 0
    packed: bool = True

    @staticmethod
    def of(weight: Weight) -> Matrix:
        """Return the sizes of a weight."""
        scales = [a for a in (weight.scales, weight.biases) if a is not None]
        stored = weight.values.nbytes + sum(a.nbytes for a in scales)
        to_widen = [a for a in (scales if weight.scales is not None else [weight.values]) if a.dtype in (mx.float16, mx.bfloat16)]
        return Matrix(*weight.shape, stored, WIDENED * sum(a.nbytes for a in to_widen), weight.scales is not None)


# Bytes that widening moves for each byte of 16-bit numbers: they are written and read as float32, besides being read as they are.
WIDENED = 4


@dataclass(frozen=True)
class Asked:
    """What is asked of the statistics of L x N rows."""

    layers: int
    tokens: int
    with_model: bool = True
    top_k: int = 1
    labels: int = 0
    reverse: bool = False


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


NOW = Design(1, 4.5, 70, 133, False, True, True, 16)


@dataclass(frozen=True)
class Tile:
    """A tile product: rows x ids of a threadgroup, and of each of its four simdgroups."""

    rows: int
    ids: int
    simd_rows: int
    simd_ids: int

    def step_cycles(self, gpu: Rates, design: Design, operand_bytes: int = 4) -> float:
        """Return the cycles that a core spends on STEP columns of one threadgroup."""
        fragments = self.simd_rows // 8, self.simd_ids // 8
        products = math.prod(fragments) * STEP // 8 * gpu.product_cycles
        stored = (self.rows + self.ids) * STEP * operand_bytes * design.conflicts
        loaded = 4 * sum(fragments) * STEP // 8 * 64 * operand_bytes
        return products + self.ids * STEP / 128 * design.dequantize + (stored + loaded) / BANK_BYTES


@dataclass(frozen=True)
class TensorTile(Tile):
    """A tile product of halves on matrix units (metal/tensor_tile.h).

    Attributes:
        halves: of a number of the rows; each is multiplied with the codes of U.
    """

    halves: int = 2

    def step_cycles(self, gpu: Rates, design: Design, operand_bytes: int = 2) -> float:
        """Return the cycles that a core spends on STEP columns of one threadgroup.

        A lane's factors are loaded once for each of its rows and ids: that a compiler sees which elements share them is an assumption.
        """
        products = 2 * self.rows * self.ids * STEP * self.halves / (gpu.matrix_flops / gpu.clock / gpu.cores)
        stored = (self.rows * self.halves + self.ids) * STEP * operand_bytes * design.conflicts
        loaded = 4 * (self.simd_rows + self.simd_ids) * STEP * operand_bytes * self.halves
        of_lane = self.simd_rows // 8 + self.simd_ids // 4  # rows and ids in the lanes of fragments of 16 x 16, a load of a simdgroup each
        lanes = self.ids * STEP * design.dequantize + self.rows * STEP * SPLIT_CYCLES[self.halves] + self.rows * self.ids * APPLY_CYCLES
        return products + (stored + loaded) / BANK_BYTES + 4 * of_lane + lanes / 128


def our_tile(rows: int, family: tuning.GpuGeneration) -> Tile:
    """Return the tile of metal/tile.h, in which simdgroups divide the ids, or that of metal/tensor_tile.h, in which they divide ids and rows."""
    if family.tensor_tiles:
        return TensorTile(rows, constants.TILE_IDS, rows // 2, constants.TILE_IDS // 2)
    return Tile(rows, constants.TILE_IDS, rows, constants.TILE_IDS // 4)


MLX_TILE = Tile(32, 32, 16, 16)  # of mx.quantized_matmul


def fill(groups: int, gpu: Rates) -> float:
    """Return the fraction of the GPU that `groups` equal threadgroups of four simdgroups keep busy.

    Each core runs four at once; the last of them to finish leave half a wave idle. If a core has fewer than four, it waits: two threadgroups do 0.7
    of the work that four do in the same time.
    """
    slots = 4 * gpu.cores
    if groups >= slots:
        return groups / (groups + slots / 2)
    of_core = math.ceil(groups / gpu.cores)
    return groups / (of_core * gpu.cores) * math.sqrt(of_core / 4) * 2 / 3


def product(rows: int, ids: int, depth: int, weight_bytes: float, gpu: Rates, design: Design, tile: Tile | None = None, splits: int = 1) -> float:
    """Return the seconds of x U^T for rows x, written as float32.

    Args:
        rows, ids, depth: sizes of the product.
        weight_bytes: bytes of U.
        gpu: the GPU.
        design: the kernel's design.
        tile: the kernel's tile; None = that of metalens.
        splits: parts of the reduction, which are written and added.
    """
    tile = tile or our_tile(tuning.matmul_block(rows, gpu.family), gpu.family)
    groups = math.ceil(rows / tile.rows) * math.ceil(ids / tile.ids) * splits
    cycles = groups / gpu.cores * depth / splits / STEP * tile.step_cycles(gpu, design)
    added = 0 if splits == 1 else 2 * splits
    return max(cycles / gpu.clock / fill(groups, gpu), (weight_bytes + 4 * rows * (depth + ids)) / gpu.bytes_per_second) + (
        4 * rows * ids * added / gpu.bytes_per_second
    )


def lens_stats(asked: Asked, matrix: Matrix, gpu: Rates, design: Design = NOW) -> float:
    """Return the seconds of the statistics on our kernels."""
    layers, tokens = (asked.layers, asked.tokens) if asked.with_model else (1, asked.layers * asked.tokens)
    blocks = tuning.blocks(layers, tokens, asked.with_model, gpu.family)
    epilogue = design.epilogue + asked.labels * COUNT_CYCLES
    if blocks.is_vector:
        return _vector(blocks, asked.labels, epilogue, matrix, gpu, design)
    ids, tile = matrix.ids, our_tile(blocks.rows, gpu.family)
    if design.counted_cores:
        ids_per_split, splits = tuning.tile_split(ids, blocks.count, gpu.device)
    else:
        tiles = -(-ids // tile.ids)
        wanted = min(tiles, -(-4 * tuning.CORES[gpu.device.architecture[-1]][0] // blocks.count))
        ids_per_split = -(-tiles // wanted) * tile.ids
        splits = -(-ids // ids_per_split)
    step = tile.step_cycles(gpu, design) * math.ceil(matrix.depth / STEP)
    of_group = ids_per_split / tile.ids * (step + tile.rows / 4 * tile.ids / 32 * epilogue) + tile.rows / 4 * design.merge
    groups = blocks.count * splits
    of_labels = asked.labels * step
    busy = groups / gpu.cores * (of_group + design.labels_per_split * of_labels) / fill(groups, gpu)
    if asked.labels and not design.labels_per_split:
        busy += blocks.count * asked.labels / gpu.cores * step / fill(blocks.count * asked.labels, gpu)
    read = matrix.stored + 4 * matrix.depth * tokens * (layers + asked.with_model)
    return max(busy / gpu.clock, read / gpu.bytes_per_second)


def _vector(blocks: tuning.Blocks, labels: int, epilogue: float, matrix: Matrix, gpu: Rates, design: Design) -> float:
    """Return the seconds of lens_stats_vector: bound by reading U, by instructions, or by reading the rows again from the second-level cache."""
    ids, depth, rows = matrix.ids * blocks.count, matrix.depth, blocks.rows
    if design.vector_uses_matrices:
        simdgroups = constants.VECTOR_SIMDS
        ids_per_split, groups = tuning.vector_split(matrix.ids, blocks.count, gpu.device)
        groups *= blocks.count
        of_four = groups * simdgroups // 4  # threadgroups, if they had four simdgroups
        of_column = gpu.product_cycles / 64 + design.dequantize / 32  # of one id
        of_ids = ids * depth * of_column + ids * rows / 32 * epilogue
        again = 4.0 * rows * depth * groups * math.ceil(ids_per_split / constants.VECTOR_PASS)
        of_labels = 8 * depth * of_column * bool(labels)  # a simdgroup for each label of eight rows, while nothing else runs
    else:
        of_four = groups = tuning.CORES[gpu.device.architecture[-1]][0]
        of_ids = ids * depth / 32 * (rows + design.dequantize) + ids * rows * REDUCTION + ids / 4 * rows * 100
        again = 1.0 * rows * depth * ids
        of_labels = 0.0
    used = gpu.cores * fill(of_four, gpu)
    cycles = max(of_ids / SCHEDULERS, again / L2_BYTES) / used
    reading = matrix.stored * blocks.count / (gpu.bytes_per_second * min(1.0, of_four / (2 * gpu.cores)))
    return max(cycles / gpu.clock, reading) + of_labels / gpu.clock


# ------------------------------------------------------------------ plain MLX


def mlx_product(rows: int, matrix: Matrix, gpu: Rates, rounded: bool = False) -> float:
    """Return the seconds of MLX's product for float32 rows: on matrix units if operands may be rounded (TF32), else not (MLX_ENABLE_TF32=0)."""
    ids, depth = matrix.ids, matrix.depth
    widening = matrix.widened / gpu.bytes_per_second
    if rows < gpu.vector_limit:
        return widening + math.ceil(rows / 5) * matrix.stored / gpu.bytes_per_second  # each matrix-vector product of five rows reads U
    if rounded and gpu.matrix_flops:
        moved = matrix.stored + 4 * rows * (depth + ids)
        return widening + max(2 * math.ceil(rows / 32) * 32 * ids * depth / gpu.matrix_flops, moved / gpu.bytes_per_second)
    return widening + product(rows, ids, depth, matrix.stored, gpu, NOW, MLX_TILE)


def plain_bytes(asked: Asked, ids: int) -> float:
    """Return the bytes that plain MLX moves for each logit: whole arrays of float32, with kernels that do not fuse across reductions.

    The logits are written and read for the log-sum-exp. Entropy and each KL divergence read two arrays, write terms and add them. A label costs a
    comparison, whose result is a byte, and a sum. For several top tokens MLX sorts (`ArgPartition` in mlx/backend/metal/sort.cpp): after a sort of
    blocks of 4096 it merges pairs of values and indices, and reads and writes both each time.
    """
    arrays = 1 + 1 + 4 * (1 + asked.with_model + asked.reverse)
    merges = max(0, math.ceil(math.log2(math.ceil(ids / 4096))))
    of_top = 4 if asked.top_k == 1 else 8 + 12 + 16 * merges + 8  # -z, blocks, merges, the indices
    return 4 * arrays + of_top + 6 * asked.labels


def plain_stats(asked: Asked, matrix: Matrix, gpu: Rates, rounded: bool = False) -> float:
    """Return the seconds of the statistics in plain MLX, in the chunks of ops/chunks.py: products, and kernels over logits in memory."""
    of_logit = matrix.ids * plain_bytes(asked, matrix.ids) / gpu.bytes_per_second

    def of_chunk(tokens: int) -> float:
        rows = asked.layers * tokens
        of_model = mlx_product(tokens, matrix, gpu, rounded) if asked.with_model else 0.0
        return mlx_product(rows, matrix, gpu, rounded) + of_model + rows * of_logit

    return sum(count * of_chunk(size) for size, count in plain_parts(asked.layers, asked.tokens, matrix.ids))


def plain_parts(layers: int, tokens: int, ids: int) -> list[tuple[int, int]]:
    """Return (tokens, how many) of the chunks of the reference on a GPU."""
    return parts(tokens, max(1, LOGITS_BYTES[mx.DeviceType.gpu] // (4 * ids * layers)))


def parts(total: int, most: int) -> list[tuple[int, int]]:
    """Return (size, how many) of the parts of `total`: as many whole ones as there are, and the rest."""
    found = [(most, total // most), (total % most, 1)]
    return [(size, count) for size, count in found if size and count]


# ------------------------------------------------------------------ what is chosen by the model


def plain_stats_are_faster(asked: Asked, matrix: Matrix) -> bool:
    """Return whether plain MLX computes the statistics faster on the GPU that kernels are planned for, in float32.

    False if it would round float32 operands there: matrix units multiply what MLX does not multiply row by row.
    """
    device = tuning.device()
    rounds = round_float32() and asked.layers * asked.tokens >= min(FEWEST_ROWS, rates_of(device).vector_limit)
    return not rounds and _plain_stats_are_faster(asked, matrix, device)


@cache
def _plain_stats_are_faster(asked: Asked, matrix: Matrix, device: tuning.Device) -> bool:
    gpu = rates_of(device)
    return plain_stats(asked, matrix, gpu) < lens_stats(asked, matrix, gpu)


def mlx_multiplies_faster(rows: int, matrix: Matrix) -> bool:
    """Return whether MLX multiplies so few rows with a packed matrix faster on the GPU that kernels are planned for, in float32."""
    return _mlx_multiplies_faster(rows, matrix, tuning.device())


@cache
def _mlx_multiplies_faster(rows: int, matrix: Matrix, device: tuning.Device) -> bool:
    gpu = rates_of(device)
    return (
        matrix.packed
        and rows < gpu.vector_limit
        and mlx_product(rows, matrix, gpu) < product(rows, matrix.ids, matrix.depth, matrix.stored, gpu, NOW)
    )
