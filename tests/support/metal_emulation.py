"""The backend `metal-emulated`: the launch code of metalens.ops.metal as it is, with the emulation of mslcpu in the place of mx.fast.metal_kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

import mslcpu
from metalens import use_backend
from metalens.ops.metal import kernel, tuning

# An M1 Pro, as MLX would name it: the tiles of the smallest registers.
M1 = tuning.Device("applegpu_g13s", 8 * 2**30)
M3 = tuning.Device("applegpu_g15c", 24 * 2**30)

needs_clang = pytest.mark.skipif(mslcpu.unavailable() is not None, reason=f"Metal kernels can't be emulated here: {mslcpu.unavailable()}")


@contextlib.contextmanager
def emulated(device: tuning.Device = M1) -> Iterator[None]:
    """Inside the `with` block, the operations of metalens.ops run on emulated Metal kernels, planned for this device."""
    before = kernel.factory, tuning.pretended
    kernel.factory, tuning.pretended = mslcpu.metal_kernel, device
    try:
        with use_backend("metal"):
            yield
    finally:
        kernel.factory, tuning.pretended = before
