"""The tuning table: tiles, threadgroups, splits and chunks, the choices that depend on the GPU.

Nothing here was measured on Apple hardware yet. The entries follow from published numbers and from the choices of other kernels; a Mac must confirm
them (docs/on-a-mac.md).

The reasons:
 * Dequantizing U takes about four cycles per weight and lane with 4 and 8 bits, by additions of halves, and nine with other bits, by conversions
   (instruction tables of metal-benchmarks). The rows of a block share them: 32 rows multiply for 36 cycles, 64 rows for 72. More rows per block also
   read U from memory less often.
 * A simdgroup holds block_rows / 8 x 2 matrices of sums, two registers each per lane: 16 registers at 32 rows, 32 at 64. Generations 13 and 14 (M1,
   M2) keep few simdgroups in flight when registers run out, so they take up to 40 rows. Generations 15 and later (M3 on) allocate registers as
   needed and take up to 64.
 * float32 and half operands multiply at the same speed on generations 13 to 16; half operands take half the threadgroup memory. Operands are float32
   unless precision 'bf16' permits rounding. Then they are half, which is finer than bfloat16; generations 13 and 14 only emulate bfloat16's rounding.
 * A vocabulary tile of 64 ids is two matrices per simdgroup, so that a loaded matrix of rows serves two products.
 * Three or four threadgroups per core run at once and hide each other's waits at barriers. The last of them to finish leave cores idle, so a dispatch
   has three such waves of threadgroups wherever the problem has the work: the vocabulary is split until there are that many.
 * D does not enter the choice of tiles: the products stream D 32 columns at a time and hold nothing of its size. D enters rows_per_dispatch.
 * A dispatch must stay well below the watchdog's limit, and below the time that makes a screen stutter: 0.1 s.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import mlx.core as mx

from metalens import _extension
from metalens.ops.metal import constants
from metalens.ops.scoped_setting import ScopedSetting
from metalens.utils.errors import UnavailableError

# Rows of a tile. The ahead-of-time library has a kernel for each of these, so it holds whatever is planned. 33 rows, a token of a model of 32 layers,
# fit the tile of 40. Tiles of 56 rows would save 1 % of the multiplications on average.
STATS_BLOCKS = (16, 24, 32, 40, 48, 64)
MATMUL_BLOCKS = (16, 32, 64)
TENSOR_ROWS = 32  # of which the rows of a tile of tensor operations are a multiple
WAVES, MOST_WAVES = 3, 12
# Tiles of a split of lens_stats. By estimate/kernel_model.py merging the lanes at a split's end takes a simdgroup 133 cycles for each row. From
# D = 512 on, that is less than a hundredth of its products for eight tiles.
WHOLE_TILES = 8
# Simdgroups that keep a core's arithmetic units busy, and those that run at once with tiles: four threadgroups of four, each with 13.8 KB (32 rows)
# of a core's 60 KB of threadgroup memory. 24 and 60 KB are the numbers of philipturner/metal-benchmarks for M1 and M2.
SIMDGROUPS_PER_CORE = 24
TILE_SIMDGROUPS_PER_CORE = 16
DISPATCH_SECONDS = 0.1
LEAST_GRADIENT_BYTES = 52 * 2**20  # of a chunk: a hundredth of a small GPU's working set holds too few rows of a large vocabulary


@dataclass(frozen=True)
class GpuGeneration:
    """The GPUs of one generation, which are treated alike.

    Attributes:
        number: the number in MLX's architecture name, such as 13 in applegpu_g13s; 13 is M1, 17 is M5.
        largest_block: largest number of rows of a tile.
        rows_per_reading: rows whose multiplication takes as long as reading and dequantizing U; with fewer rows, memory bounds the speed.
        clock: cycles per second. A core has 128 units for an FMA.
        matrix_fmas: FMAs of simdgroup matrices per core and clock, of 128, for half and float alike.
        core_bandwidth: bytes per second of the memory for each core, roughly; the base M1 and M4 have less.
        tensor_tiles: whether products use the tiles of metal/tensor_tile.h, whose rows are a multiple of 32.
    """

    number: int
    largest_block: int
    rows_per_reading: int
    clock: float
    matrix_fmas: int
    core_bandwidth: float
    tensor_tiles: bool = False

    @property
    def core_flops(self) -> float:
        """Sustained multiplications and additions per second and core, at 60 % of the peak."""
        return 0.6 * 2 * 128 * self.clock

    @property
    def product_cycles(self) -> float:
        """Cycles of a simdgroup for a product of 8 x 8 matrices; a core runs four simdgroups at once."""
        return 4 * 8**3 / self.matrix_fmas


# Clocks and bandwidths are those of the chips in estimate/chips.py, with their sources. matrix_fmas of 13 and 14: measured on M1 (metal-benchmarks).
# From 15 on others reach 88 % of the peak in whole products (ml-explore/mlx#3196, M3 Ultra) and up to 94 % in attention (metal-flash-attention, M3):
# the bound is 94 %.
GENERATIONS = {
    13: GpuGeneration(13, 40, 9, 1.28e9, 102, 12.5e9),  # M1
    14: GpuGeneration(14, 40, 8, 1.40e9, 102, 10.5e9),  # M2
    15: GpuGeneration(15, 64, 8, 1.40e9, 120, 10e9),  # M3
    16: GpuGeneration(16, 64, 7, 1.60e9, 120, 13.5e9),  # M4
    17: GpuGeneration(17, 64, 7, 1.65e9, 120, 15.3e9),  # M5 without its matrix units (matrix_units.py, use_tiles)
}
DEFAULT = GENERATIONS[14]  # an unknown GPU counts as a slow one of the simplest kind

# The last letter of the architecture's name stands for the size of the GPU: (fewest, most) cores sold under it. A Pro and a Max share a letter: MLX
# names both M4 Pro and M4 Max applegpu_g16s. Two dies of a Max are an Ultra.
CORES = {"p": (4, 6), "g": (7, 10), "s": (14, 40), "d": (48, 80)}

MATRIX_UNIT_GENERATION = 17  # the first generation of GPUs with matrix units, M5
MATRIX_UNIT_SPEED = 4  # times as fast as simdgroup matrices, with 16-bit operands
MATRIX_UNIT_MACOS, MATRIX_UNIT_DARWIN = (26, 2), (25, 2)  # the first macOS on which MLX multiplies with them, and its Darwin


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        architecture: MLX's name of it.
        working_set: bytes that may be in use without paging.
        counted_cores: number of cores as the system counts them. 0 = not known.
        matrix_units: whether MLX multiplies 16-bit operands on matrix units here, and float32 operands too, rounded to 11 bits.
        tensor_tiles: whether kernels multiply on them too (see `use_tiles`).
    """

    architecture: str
    working_set: int
    counted_cores: int = 0
    matrix_units: bool = False
    tensor_tiles: bool = False

    @property
    def generation(self) -> GpuGeneration:
        """The generation's entry in the table, or the default."""
        entry = GENERATIONS.get(self.number, GENERATIONS[17] if self.number > 17 else DEFAULT)
        return replace(entry, tensor_tiles=True) if self.tensor_tiles else entry

    @property
    def number(self) -> int:
        """The number in the architecture's name; 0 if there is none."""
        return int("".join(c for c in self.architecture.removeprefix("applegpu_g") if c.isdigit()) or 0)

    @property
    def cores(self) -> int:
        """The number of cores to fill. If it is not known, the most that there may be: a split too many costs little, an idle core much."""
        return self.counted_cores or self._cores_sold[1]

    @property
    def fewest_cores(self) -> int:
        """A lower bound of the number of cores, which keeps dispatches short."""
        return self.counted_cores or self._cores_sold[0]

    @property
    def _cores_sold(self) -> tuple[int, int]:
        return CORES.get(self.architecture[-1:], CORES["g"])


@cache
def _this_device() -> Device:
    # A default device that is a CPU would describe the CPU. Without a GPU there are no facts.
    facts = mx.device_info(mx.gpu)
    architecture = str(facts.get("architecture", ""))
    # platform.mac_ver() gives 16.x in a Python that was built with an SDK older than macOS 26; Darwin's version is always true.
    darwin = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdigit())
    device = Device(architecture, int(facts.get("max_recommended_working_set_size", 4 * 2**30)), _extension.gpu_core_count())
    first = MATRIX_UNIT_GENERATION + architecture.endswith("p")  # MLX uses those of a phone's GPU one generation later
    return replace(device, matrix_units=device.number >= first and darwin >= MATRIX_UNIT_DARWIN)


_planned_for: list[Device] = []


@contextlib.contextmanager
def planned_for(device: Device) -> Iterator[None]:
    """Plan kernels for this GPU instead of the one at hand, inside the `with` block."""
    _planned_for.append(device)
    try:
        yield
    finally:
        _planned_for.pop()


Tiles = Literal["simdgroup", "tensor"]

# Not chosen by the table, because the tiles of tensor operations could not be timed yet.
_tiles: ScopedSetting[Tiles] = ScopedSetting("kind of tile", ("simdgroup", "tensor"), "METALENS_METAL_TILES", "use_tiles")


def use_tiles(name: Tiles) -> AbstractContextManager[None]:
    """Set how the kernels multiply tiles inside the `with` block, as METALENS_METAL_TILES does for the process.

    'simdgroup' uses the matrix instructions of every GPU. 'tensor' uses the matrix units of an M5 or later, by the tensor operations of Metal 4, for
    the statistics and for the products of `linear` (metal/tensor_tile.h).

    Raises:
        InvalidValueError: on entry of the block, for an unknown name.
        UnavailableError: from an operation on the GPU: 'tensor' where there are no matrix units.
    """
    return _tiles.use(name)


def check_tiles() -> None:
    """Check that the GPU that kernels are planned for can multiply tiles as the setting says.

    Raises:
        InvalidValueError: if METALENS_METAL_TILES has an unknown value.
        UnavailableError: if the setting is 'tensor', and this GPU or this macOS has no matrix units for it.
    """
    gpu = device()
    if _tiles.get() == "tensor" and not gpu.matrix_units:
        macos = ".".join(map(str, MATRIX_UNIT_MACOS))
        raise UnavailableError(
            f"METALENS_METAL_TILES=tensor asks for the matrix units of an M5 or later under macOS {macos} or later, but this is {gpu.architecture} "
            f"under {platform.system()} {platform.release()}. Choose 'simdgroup'."
        )


def device() -> Device:
    """Return the GPU that kernels are planned for."""
    found = _planned_for[-1] if _planned_for else _this_device()
    return replace(found, tensor_tiles=True) if found.matrix_units and _tiles.get() == "tensor" else found


@dataclass(frozen=True)
class Blocks:
    """The division of lens rows among threadgroups (metal/stats_rows.h).

    Attributes:
        rows: slots of a block.
        repeat_slots: those of them that hold a repeated row of the model: 0 or 1.
        count: number of blocks.
        is_vector: whether the one block goes to lens_stats_vector, the kernel without tiles.
    """

    rows: int
    repeat_slots: int
    count: int
    is_vector: bool


def tile_rows(choices: tuple[int, ...], generation: GpuGeneration) -> list[int]:
    """Return those of the numbers of rows that a tile may have on a GPU."""
    return [rows for rows in choices if rows <= generation.largest_block and (not generation.tensor_tiles or rows % TENSOR_ROWS == 0)]


@cache
def blocks(layers: int, tokens: int, with_model: bool, generation: GpuGeneration) -> Blocks:
    """Choose the division of layers x tokens rows, and of the model's rows, that costs the least multiplication and reading."""
    of_token = layers + int(with_model)
    total = tokens * of_token
    few = constants.VECTOR_ROWS
    if total <= few:
        return Blocks(few, 0, 1, True)

    def division(rows: int) -> Blocks:
        # Blocks of whole tokens divide no token's rows.
        repeat_slots = int(with_model and total > rows and rows % of_token != 0)
        return Blocks(rows, repeat_slots, -(-total // (rows - repeat_slots)), False)

    if division(few).count <= 2:  # U is read twice, which takes less time than tiles of sixteen rows
        return replace(division(few), is_vector=True)
    possible = (division(rows) for rows in tile_rows(STATS_BLOCKS, generation))
    return min(possible, key=lambda b: b.count * (b.rows + generation.rows_per_reading))


def matmul_block(rows: int, generation: GpuGeneration) -> int:
    """Return the rows of a tile for a matrix product of `rows` rows: those that cost the least multiplication and reading."""
    return min(tile_rows(MATMUL_BLOCKS, generation), key=lambda block: -(-rows // block) * (block + generation.rows_per_reading))


def _groups_without_tiles(simdgroups: int, gpu: Device) -> int:
    """Return the threadgroups, of `simdgroups` simdgroups each and with hardly any memory, that make WAVES waves."""
    return WAVES * -(-SIMDGROUPS_PER_CORE // simdgroups) * gpu.cores


def split_vocab(vocab: int, step: int, groups: int, gpu: Device, simdgroups: int = 4, whole_steps: int | None = None) -> tuple[int, int]:
    """Return (ids per split, splits): whole steps, and enough splits for WAVES waves, unless the vocabulary has too few steps.

    Args:
        vocab: number of ids.
        step: ids that must not be divided.
        groups: threadgroups of a split.
        gpu: the GPU to fill.
        simdgroups: simdgroups of a threadgroup.
        whole_steps: steps of a split that is long enough to make up for its cost. If WAVES waves leave longer splits, there may be up to MOST_WAVES:
            the fewer and longer the threadgroups, the more cores are idle at the end. None = splits cost too much for that.
    """
    steps = -(-vocab // step)
    of_wave = -(-TILE_SIMDGROUPS_PER_CORE // simdgroups) * gpu.cores
    wanted = -(-WAVES * of_wave // max(groups, 1))
    if whole_steps is not None:
        wanted = max(wanted, min(steps // whole_steps, MOST_WAVES * of_wave // max(groups, 1)))
    ids_per_split = max(1, steps // wanted) * step
    return ids_per_split, -(-vocab // ids_per_split)


def tile_split(vocab: int, blocks: int, gpu: Device) -> tuple[int, int]:
    """Return (ids per split, splits) of the statistics of `blocks` blocks of rows in tiles."""
    return split_vocab(vocab, constants.TILE_IDS, blocks, gpu, whole_steps=WHOLE_TILES)


def vector_split(vocab: int, blocks: int, gpu: Device) -> tuple[int, int]:
    """Return (ids per split, threadgroups along the vocabulary) of lens_stats_vector, in which each simdgroup takes a split."""
    simdgroups = constants.VECTOR_SIMDS
    ids = split_vocab(vocab, constants.VECTOR_IDS * simdgroups, blocks, gpu, simdgroups)[0] // simdgroups
    if ids > constants.VECTOR_PASS:  # whole passes, as each reads the rows
        ids -= ids % constants.VECTOR_PASS
    return ids, -(-vocab // (ids * simdgroups))


def rows_per_group(rows: int, gpu: Device) -> int:
    """Return the rows of a threadgroup of norm_grad: few enough for WAVES waves of threadgroups, at most as many as the kernel can take."""
    return max(1, min(constants.NORM_ROWS, rows // _groups_without_tiles(constants.SIMDS, gpu)))


def padded_rows(rows: int, generation: GpuGeneration) -> int:
    """Return the rows that a matrix product of `rows` rows multiplies, and those that it could multiply while it reads U again for each block."""
    block = matmul_block(rows, generation)
    return -(-rows // block) * (block + generation.rows_per_reading)


def rows_per_dispatch(vocab: int, depth: int, gpu: Device) -> int:
    """Return the rows that one product with U can take in DISPATCH_SECONDS; at least a tile."""
    return max(32, int(DISPATCH_SECONDS * gpu.generation.core_flops * gpu.fewest_cores / (2 * vocab * depth)))


def chunk_rows(vocab: int, depth: int, gradient_bytes: int, gpu: Device, on_matrix_units: bool = False) -> int:
    """Return the rows of a chunk of lens_kl: float32 logits, and a gradient of `gradient_bytes` for each of them.

    A hundredth of the working set for both does not compete with the model. Three things may ask for more or less:
     * lens_softmax_grad has a threadgroup for each row, and a GPU with many cores wants WAVES waves of them; a twentieth of the working set at most.
     * LEAST_GRADIENT_BYTES of gradient make several tiles.
     * The products are short dispatches.
    """
    row_bytes = vocab * (4 + gradient_bytes)
    rows = min(2**30, gpu.working_set // 100) // row_bytes
    filled = min(_groups_without_tiles(constants.ROW_SIMDS, gpu), gpu.working_set // 20 // row_bytes)
    least = -(-LEAST_GRADIENT_BYTES // (vocab * gradient_bytes))
    short = rows_per_dispatch(vocab, depth, gpu) * (MATRIX_UNIT_SPEED if on_matrix_units else 1)
    return max(2, min(max(rows, filled, least), short))
