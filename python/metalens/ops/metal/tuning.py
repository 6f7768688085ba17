"""The tuning table: tiles, threadgroups, splits and chunks, the choices that depend on the GPU.

Nothing here was measured on Apple hardware yet. The entries follow from published numbers and from the choices of other kernels; a Mac must confirm
them (docs/on-a-mac.md).

The reasons:
 * Dequantizing a unit of U costs about four instructions per weight, which the rows of a block share: an eighth of the multiplications at 32 rows, a
   sixteenth at 64. More rows per block also read U from memory less often.
 * A simdgroup holds block_rows / 8 x 2 matrices of sums, two registers each per lane: 16 registers at 32 rows, 32 at 64. Generations 13 and 14 (M1,
   M2) keep few simdgroups in flight when registers run out, so they take 32 rows. Generations 15 and later (M3 on) allocate registers as needed and
   take up to 64.
 * float32 and half operands multiply at the same speed on generations 13 to 16; half operands take half the threadgroup memory. Operands are float32
   unless precision 'bf16' permits rounding. Then they are half, which is finer than bfloat16; generations 13 and 14 only emulate bfloat16's rounding.
 * A vocabulary tile of 64 ids is two matrices per simdgroup, so that a loaded matrix of rows serves two products.
 * Three or four threadgroups per core hide the waits at barriers: the vocabulary is split until there are that many.
 * D does not enter the choice of tiles: the products stream D 32 columns at a time and hold nothing of its size. D enters rows_per_dispatch.
 * A dispatch must stay well below the watchdog's limit, and below the time that makes a screen stutter: 0.1 s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

VECTOR_ROWS = (1, 2, 4, 8)  # rows of a block of lens_stats_vector: with the four ids of a step, eight rows fill a simdgroup
GROUPS_PER_CORE = 4
DISPATCH_SECONDS = 0.1


@dataclass(frozen=True)
class GpuGeneration:
    """The GPUs of one generation, which are treated alike.

    Attributes:
        number: the number in MLX's architecture name, such as 13 in applegpu_g13s; 13 is M1, 17 is M5.
        largest_block: largest number of rows of a tile.
        rows_per_reading: rows whose multiplication takes as long as reading and dequantizing U; with fewer rows, memory bounds the speed.
        core_flops: sustained multiplications and additions per second and core, at 60 % of the peak.
    """

    number: int
    largest_block: int
    rows_per_reading: int
    core_flops: float


GENERATIONS = {
    13: GpuGeneration(13, 32, 9, 0.20e12),  # M1: 128 FMA per clock and core, 1.28 GHz
    14: GpuGeneration(14, 32, 8, 0.21e12),  # M2: 1.40 GHz
    15: GpuGeneration(15, 64, 8, 0.21e12),  # M3: 1.40 GHz
    16: GpuGeneration(16, 64, 7, 0.25e12),  # M4: 1.60 GHz
    17: GpuGeneration(17, 64, 7, 0.25e12),  # M5 without its matrix units, which have no kernels yet (docs/on-a-mac.md)
}
DEFAULT = GENERATIONS[14]  # an unknown GPU counts as a slow one of the simplest kind

# The last letter of the architecture's name stands for the size of the GPU. These are the fewest cores sold under each letter, which keeps dispatches
# short.
CORES = {"p": 4, "g": 7, "s": 14, "c": 24, "d": 48}


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        architecture: MLX's name of it.
        working_set: bytes that may be in use without paging.
    """

    architecture: str
    working_set: int

    @property
    def generation(self) -> GpuGeneration:
        """The generation's entry in the table, or the default."""
        digits = "".join(c for c in self.architecture.removeprefix("applegpu_g") if c.isdigit())
        return GENERATIONS.get(int(digits), GENERATIONS[17] if int(digits) > 17 else DEFAULT) if digits else DEFAULT

    @property
    def cores(self) -> int:
        """A lower bound of the number of cores."""
        return CORES.get(self.architecture[-1:], 7)


@cache
def _this_device() -> Device:
    facts = mx.device_info()
    return Device(str(facts.get("architecture", "")), int(facts.get("max_recommended_working_set_size", 4 * 2**30)))


_planned_for: list[Device] = []


@contextlib.contextmanager
def planned_for(device: Device) -> Iterator[None]:
    """Plan kernels for this GPU instead of the one at hand, inside the `with` block."""
    _planned_for.append(device)
    try:
        yield
    finally:
        _planned_for.pop()


def device() -> Device:
    """Return the GPU that kernels are planned for."""
    return _planned_for[-1] if _planned_for else _this_device()


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


@cache
def blocks(layers: int, tokens: int, with_model: bool, generation: GpuGeneration) -> Blocks:
    """Choose the division of layers x tokens rows, and of the model's rows, that costs the least multiplication and reading."""
    total = tokens * (layers + int(with_model))
    if total <= VECTOR_ROWS[-1]:
        return Blocks(next(rows for rows in VECTOR_ROWS if rows >= total), 0, 1, True)

    def division(rows: int) -> Blocks:
        repeat_slots = int(with_model and total > rows)
        return Blocks(rows, repeat_slots, -(-total // (rows - repeat_slots)), False)

    return min(map(division, range(8, generation.largest_block + 1, 8)), key=lambda b: b.count * (b.rows + generation.rows_per_reading))


def matmul_block(rows: int, generation: GpuGeneration) -> int:
    """Return the rows of a tile for a matrix product of `rows` rows."""
    return min(generation.largest_block, 8 * -(-rows // 8))


def split_vocab(vocab: int, step: int, groups: int, gpu: Device) -> tuple[int, int]:
    """Return (ids per split, splits): whole steps, and enough splits to fill the GPU with `groups` threadgroups for each."""
    steps = -(-vocab // step)
    wanted = min(steps, max(1, -(-GROUPS_PER_CORE * gpu.cores // max(groups, 1))))
    ids_per_split = -(-steps // wanted) * step
    return ids_per_split, -(-vocab // ids_per_split)


def rows_per_dispatch(vocab: int, depth: int, gpu: Device) -> int:
    """Return the rows that one product with U can take in DISPATCH_SECONDS; at least a tile."""
    return max(32, int(DISPATCH_SECONDS * gpu.generation.core_flops * gpu.cores / (2 * vocab * depth)))


def chunk_bytes(gpu: Device) -> int:
    """Return the memory for a chunk of logits and its gradient: a hundredth of the working set, so that it never competes with the model."""
    return max(32 * 2**20, min(2**30, gpu.working_set // 100))
