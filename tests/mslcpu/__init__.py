"""mslcpu runs unchanged Metal compute kernels on a Linux CPU and finds their errors. See README.md."""

from .errors import MslError
from .kernel import MetalKernel, compile_library, metal_kernel, prebuild
from .mutate import count_barriers, without_barrier
from .options import SCHEDULES, Accesses, Options, Report, Traffic, options, recording
from .toolchain import unavailable

__all__ = [
    "SCHEDULES",
    "Accesses",
    "MetalKernel",
    "MslError",
    "Options",
    "Report",
    "Traffic",
    "compile_library",
    "count_barriers",
    "metal_kernel",
    "options",
    "prebuild",
    "recording",
    "unavailable",
    "without_barrier",
]
