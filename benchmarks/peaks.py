"""Measure the peaks of this machine (see peaks.cpp), with which measured speeds are compared."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peaks.cpp")
BURST_SECONDS = 0.05
FMA, BF16_DOT, AMX, READ = "float32 FMA", "bf16 dot product", "bf16 AMX", "memory read"
FUNCTIONS = {FMA: "fma_peak", BF16_DOT: "bf16_dot_peak", AMX: "amx_peak", READ: "read_peak"}


class UnavailableError(RuntimeError):
    """Raised with the reason, in a sentence, why no peaks can be measured here."""


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Peaks:
    """Bursts at full load on all usable cores.

    Raises:
        UnavailableError: if no C++ compiler is found, or if peaks.cpp does not compile.
    """

    def __init__(self) -> None:
        compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
        if compiler is None:
            raise UnavailableError("No C++ compiler was found to build peaks.cpp. Install g++, or set CXX to a compiler.")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "peaks.so"
            command = [compiler, "-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnavailableError(f"{SOURCE.name} does not compile here: {done.stderr.strip().splitlines()[:1]}")
            self._library = ctypes.CDLL(str(library))
        for function in FUNCTIONS.values():
            getattr(self._library, function).restype = ctypes.c_double
            getattr(self._library, function).argtypes = [ctypes.c_int, ctypes.c_double]
        self.threads = cores()
        self.vector_bits = int(self._library.vector_bits())
        self.available = [name for name in FUNCTIONS if self.burst(name, 0.001) > 0]

    def burst(self, name: str, seconds: float = BURST_SECONDS) -> float:
        """Run a burst of this length and return its FLOP/s (bytes/s for READ); 0 if the CPU lacks the instructions."""
        return float(getattr(self._library, FUNCTIONS[name])(self.threads, seconds))

    @property
    def bf16(self) -> str | None:
        """Return the CPU's fastest bfloat16 multiply, or None if it has none."""
        return AMX if AMX in self.available else BF16_DOT if BF16_DOT in self.available else None


if __name__ == "__main__":
    peaks = Peaks()
    for name in peaks.available:
        print(f"{name}: {peaks.burst(name) / 1e9:.1f} {'GB/s' if name == READ else 'GFLOP/s'}")
