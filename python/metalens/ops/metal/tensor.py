"""The M5's matrix units: the probe, the place of their kernels, and what runs until they exist.

Generation 17 multiplies tiles of 16 x 32 x 16 several times as fast through Metal 4's tensor operations (MetalPerformancePrimitives, `matmul2d` on
cooperative tensors), given macOS 26.2 and a toolchain that has the header. Their types differ from the simdgroup matrices of metal/tile.h only in
what a multiplication is: operands of equal type, 16 x 32 x 16 at a time, float32 sums. So a kernel for them is metal/tile.h with another `multiply`
and `Accumulators`, chosen by `Tiles`; callers do not change.

That header is written last, on the hardware that can show it right: the emulation of the tests knows simdgroup matrices only, and nothing of the
project counts as working that has not run. Until then `engine` answers SIMDGROUP everywhere, and the M5 runs the kernels of its predecessors.
Descriptors already say which engine they are for (descriptors.py): a TENSOR one names the type TensorTile and has "tensor" in its name.
"""

from __future__ import annotations

import platform
from enum import Enum

FIRST_GENERATION = 17
FIRST_MACOS = (26, 2)
TILE = (16, 32, 16)

# Headers of metal/ for the matrix units: none yet.
HEADER: str | None = None


class Engine(Enum):
    """What multiplies tiles: the name of the type of tiles in metal/."""

    SIMDGROUP = "Tile"
    TENSOR = "TensorTile"


def supported(generation: int, macos: tuple[int, ...] | None = None) -> tuple[bool, str]:
    """Whether this GPU and system have matrix units that a kernel could use, and if not, why.

    Args:
        generation: of the GPU, 17 for M5.
        macos: the system's version; None = this one's.
    """
    if generation < FIRST_GENERATION:
        return False, f"the GPU is of generation {generation}; matrix units begin with {FIRST_GENERATION} (M5)"
    found = macos if macos is not None else tuple(int(part) for part in platform.mac_ver()[0].split(".") if part)
    if found < FIRST_MACOS:
        return False, f"tensor operations need macOS {'.'.join(map(str, FIRST_MACOS))}, this is {'.'.join(map(str, found)) or 'another system'}"
    return True, ""


def engine(generation: int, macos: tuple[int, ...] | None = None) -> Engine:
    """The fastest one that there are kernels for."""
    able, _ = supported(generation, macos)
    return Engine.TENSOR if able and HEADER is not None else Engine.SIMDGROUP
