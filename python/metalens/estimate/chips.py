"""Published numbers of Apple's GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from metalens.ops.metal.cost import Cost
from metalens.ops.metal.speed import Rates
from metalens.ops.metal.tuning import GENERATIONS, Device, GpuGeneration

WORKING_SETS = {"g": 10.7, "s": 36.0, "d": 128.0}  # GB, of machines with 16, 48 and 192 GB


@dataclass(frozen=True)
class Chip:
    """Published numbers of a GPU.

    Attributes:
        generation: generation of the GPU, 13 for M1.
        letter: last letter of MLX's name of its architecture.
        cores: number of cores.
        tflops: float32 TFLOP/s of all cores.
        bandwidth: bandwidth of the memory, GB/s.
        source: publisher of these numbers.
        matrix_tflops: TFLOP/s of the matrix units with 16-bit operands. 0 = there are none.
    """

    generation: int
    letter: str
    cores: int
    tflops: float
    bandwidth: float
    source: str
    matrix_tflops: float = 0.0

    @property
    def family(self) -> GpuGeneration:
        """Return the tuning of this generation."""
        return GENERATIONS[self.generation]

    @property
    def device(self) -> Device:
        """Return the GPU as kernels are planned for it."""
        working_set = int(WORKING_SETS[self.letter] * 1e9)
        return Device(f"applegpu_g{self.generation}{self.letter}", working_set, self.cores, matrix_units=self.matrix_tflops > 0)

    @property
    def clock(self) -> float:
        """Return cycles per second: a core has 128 units for an FMA."""
        return self.tflops * 1e12 / (self.cores * 2 * 128)

    @property
    def bytes_per_second(self) -> float:
        """Return bytes per second of the memory."""
        return self.bandwidth * 1e9

    @property
    def matrix_flops(self) -> float:
        """Return operations per second of simdgroup matrices, at most."""
        return self.tflops * 1e12 * self.family.matrix_fmas / 128

    @property
    def flops_in_16_bits(self) -> float:
        """Return operations per second of products whose operands may be rounded to 16 bits, at most."""
        return self.matrix_tflops * 1e12 or self.matrix_flops

    @property
    def rates(self) -> Rates:
        """Return what the model of the kernels' speed takes."""
        return Rates(self.device, self.cores, self.clock, self.bytes_per_second, self.matrix_tflops * 1e12)

    def seconds(self, work: Cost, in_16_bits: bool = False) -> float:
        """Return the shortest time of a kernel."""
        return max(work.flops / (self.flops_in_16_bits if in_16_bits else self.matrix_flops), work.bytes / self.bytes_per_second)


CHIPS = {
    "M1": Chip(13, "g", 8, 2.62, 68, "metal-benchmarks, 8 cores"),
    "M1-Max": Chip(13, "s", 32, 10.6, 400, "metal-benchmarks, 32 cores"),
    "M2": Chip(14, "g", 10, 3.58, 100, "Apple, 10 cores"),
    "M2-Max": Chip(14, "s", 38, 13.6, 400, "half of M2-Ultra, 38 cores"),
    "M2-Ultra": Chip(14, "d", 76, 27.2, 800, "Apple, 76 cores"),
    "M3-Max": Chip(15, "s", 40, 14.3, 400, "hmc-tech, 40 cores at 1.4 GHz"),
    "M4": Chip(16, "g", 10, 3.76, 120, "hmc-tech, 10 cores"),
    "M4-Max": Chip(16, "s", 40, 17.2, 546, "hmc-tech and Apple, 40 cores"),
    "M5": Chip(17, "g", 10, 4.15, 153.6, "published rooflines, 10 cores; matrix units: 1024 operations per core and clock (Zakharko)", 16.6),
    "M5-Max": Chip(17, "s", 40, 18.0, 614, "published estimates, 40 cores; matrix units: estimate by Zakharko", 70.0),
}
