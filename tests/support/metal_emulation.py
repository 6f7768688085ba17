"""Run the launch code of metalens.ops.metal unchanged, with the emulation of mslcpu in place of mx.fast.metal_kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

import mslcpu
from metalens import use_backend
from metalens.ops.metal import kernel, tuning

# An M1 Pro, an M3 Max and an M5 Max, under MLX's names: GPUs with tiles of 32 and of 64 rows, and with matrix units.
M1 = tuning.Device("applegpu_g13s", 8 * 2**30, 16)
M3 = tuning.Device("applegpu_g15s", 24 * 2**30, 40)
M5 = tuning.Device("applegpu_g17s", 24 * 2**30, 40, matrix_units=True)

needs_clang = pytest.mark.skipif(mslcpu.unavailable() is not None, reason=f"Metal kernels can't be emulated here: {mslcpu.unavailable()}")


@contextlib.contextmanager
def emulated(device: tuning.Device = M1) -> Iterator[None]:
    """Run the operations of metalens.ops on emulated Metal kernels, planned for this device, inside the `with` block."""
    with kernel.emulation(mslcpu.metal_kernel, device), use_backend("metal"):
        yield
