"""Which tiles, how many threadgroups, how large a chunk: the choices that depend on the GPU, in one table.

Nothing here was measured on Apple hardware yet; the entries follow from published numbers and from what other kernels settled on. A Mac must confirm
them (docs/on-a-mac.md).

What decides:
 * A dequantized unit of U costs about four instructions per weight, shared by the block's rows: an eighth of the multiplications at 32 rows, a
   sixteenth at 64. More rows per block also read U from memory less often.
 * A simdgroup keeps block_rows / 8 x 2 matrices of sums, two registers each per lane: 16 registers at 32 rows, 32 at 64. Generations 13 and 14
   (M1, M2) keep few simdgroups in flight when registers run out, so they take 32 rows; 15 and later (M3 on) share registers out as needed and
   take up to 64.
 * float32 and half operands multiply at the same speed on generations 13 to 16; half ones take half the threadgroup memory. Operands are float32
   unless precision 'bf16' allows rounding; then they are half, which is finer: generations 13 and 14 only emulate bfloat16's rounding.
 * A vocabulary tile of 64 ids is two matrices per simdgroup: a matrix of rows that was loaded serves two products.
 * Three or four threadgroups per core hide the waits at barriers: the vocabulary is split until there are as many.
 * D does not enter the choice of tiles: the products stream it 32 columns at a time and keep nothing of its size. It enters rows_per_dispatch.
 * A dispatch must stay well below the watchdog's limit, and below what makes a screen stutter: 0.1 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metalens.ops.metal.tensor import Engine, engine

TILE_IDS = 64
TILE_DEPTH = 32
FEW_ROWS = 8  # rows that the kernel without tiles takes: with four ids they fill a simdgroup
GROUPS_PER_CORE = 4
DISPATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Family:
    """GPUs that are treated alike.

    Attributes:
        generation: 13 is M1, 17 is M5: the number in MLX's architecture name, applegpu_g13s.
        largest_block: rows of a tile, at most.
        rows_per_reading: so many rows multiply in the time that reading and dequantizing U takes; fewer are bound by memory.
        core_flops: sustained multiplications and additions per second and core, at 60 % of the peak.
    """

    generation: int
    largest_block: int
    rows_per_reading: int
    core_flops: float


FAMILIES = {
    13: Family(13, 32, 9, 0.20e12),  # M1: 128 FMA per clock and core, 1.28 GHz
    14: Family(14, 32, 8, 0.21e12),  # M2: 1.40 GHz
    15: Family(15, 64, 8, 0.21e12),  # M3: 1.40 GHz
    16: Family(16, 64, 7, 0.25e12),  # M4: 1.60 GHz
    17: Family(17, 64, 7, 0.25e12),  # M5 without its matrix units; with them, see tensor.py
}
DEFAULT = FAMILIES[14]  # an unknown GPU is taken for a slow one of the simplest kind

# The last letter of the architecture's name says how large the GPU is; the fewest cores that were sold under it, so that dispatches stay short.
CORES = {"p": 4, "g": 7, "s": 14, "c": 24, "d": 48}


@dataclass(frozen=True)
class Device:
    """The GPU at hand.

    Attributes:
        architecture: as MLX names it.
        working_set: bytes that may be in use without paging.
    """

    architecture: str
    working_set: int

    @property
    def family(self) -> Family:
        """The table's entry, or the default."""
        digits = "".join(c for c in self.architecture.removeprefix("applegpu_g") if c.isdigit())
        return FAMILIES.get(int(digits), FAMILIES[17] if int(digits) > 17 else DEFAULT) if digits else DEFAULT

    @property
    def cores(self) -> int:
        """At least so many."""
        return CORES.get(self.architecture[-1:], 7)

    @property
    def engine(self) -> Engine:
        """What multiplies: simdgroup matrices, or an M5's matrix units once there are kernels for them."""
        return engine(self.family.generation)


@cache
def _this_device() -> Device:
    facts = mx.device_info()
    return Device(str(facts.get("architecture", "")), int(facts.get("max_recommended_working_set_size", 4 * 2**30)))


# The tests put another device in its place.
pretended: Device | None = None


def device() -> Device:
    """The GPU that kernels are planned for."""
    return pretended or _this_device()


@dataclass(frozen=True)
class Blocks:
    """How lens rows are dealt to threadgroups (metal/stats_rows.h).

    Attributes:
        rows: slots of a block.
        reserved: of them, for a repeated row of the model.
        count: blocks.
        few: whether the kernel without tiles takes them.
    """

    rows: int
    reserved: int
    count: int
    few: bool


@cache
def blocks(layers: int, tokens: int, with_model: bool, family: Family) -> Blocks:
    """The division of layers x tokens rows, and of the model's, that multiplies and reads least."""
    stream = tokens * (layers + int(with_model))
    if stream <= FEW_ROWS:
        return Blocks(next(r for r in (1, 2, 4, 8) if r >= stream), 0, 1, True)

    def division(rows: int) -> Blocks:
        reserved = int(with_model and stream > rows)
        return Blocks(rows, reserved, -(-stream // (rows - reserved)), False)

    return min(map(division, range(8, family.largest_block + 1, 8)), key=lambda b: b.count * (b.rows + family.rows_per_reading))


def plain_block(rows: int, family: Family) -> int:
    """Rows of a tile for a plain product of so many rows."""
    return min(family.largest_block, 8 * -(-rows // 8))


def shares(vocab: int, step: int, groups: int, gpu: Device) -> tuple[int, int]:
    """(ids per split, splits): whole steps, and as many splits as it takes to fill the GPU beside `groups` threadgroups."""
    steps = -(-vocab // step)
    wanted = min(steps, max(1, -(-GROUPS_PER_CORE * gpu.cores // max(groups, 1))))
    share = -(-steps // wanted) * step
    return share, -(-vocab // share)


def rows_per_dispatch(vocab: int, depth: int, gpu: Device) -> int:
    """Rows that one product with U may take in DISPATCH_SECONDS; at least a tile."""
    return max(32, int(DISPATCH_SECONDS * gpu.family.core_flops * gpu.cores / (2 * vocab * depth)))


def chunk_bytes(gpu: Device) -> int:
    """Memory for a chunk of logits and its gradient: a hundredth of what the GPU may use, so that it never competes with the model."""
    return max(32 * 2**20, min(2**30, gpu.working_set // 100))
