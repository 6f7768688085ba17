"""Call the runtime: memory for buffers, the launch record, and errors with the kernel's own lines."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .build import INCLUDE, runtime_library
from .errors import MslError
from .options import SCHEDULES, TENSOR_LAYOUTS, Accesses, Options
from .toolchain import symbolizer

WRITABLE, INITIALIZED = 1, 2
COPY_BELOW = 256 << 20  # larger inputs of checked launches are not copied; larger outputs start as zeros


class _Accesses(ctypes.Structure):  # abi.h: Accesses
    _fields_ = (
        ("instructions", ctypes.c_uint64 * 6), ("lines", ctypes.c_uint64), ("cycles", ctypes.c_uint64), ("conflicts", ctypes.c_uint64),
    )  # fmt: skip


class _Buffer(ctypes.Structure):  # abi.h: Buffer
    _fields_ = (
        ("data", ctypes.c_void_p), ("before", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("itemsize", ctypes.c_uint32),
        ("read", ctypes.c_uint64), ("written", ctypes.c_uint64), ("unique_read", ctypes.c_uint64), ("unique_written", ctypes.c_uint64),
        ("loads", _Accesses), ("stores", _Accesses),
    )  # fmt: skip


class _Launch(ctypes.Structure):  # abi.h: Launch
    _fields_ = (
        ("entry", ctypes.c_void_p), ("buffers", ctypes.POINTER(_Buffer)), ("threadgroup_buffer_bytes", ctypes.c_void_p),
        ("buffer_count", ctypes.c_uint32), ("threadgroup_buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3), ("threadgroup", ctypes.c_uint32 * 3), ("checked", ctypes.c_uint32), ("instructions", ctypes.c_uint32),
        ("schedule", ctypes.c_uint32), ("strict", ctypes.c_uint32), ("stack_bytes", ctypes.c_uint32), ("inexact", ctypes.c_uint32),
        ("tensor_layout", ctypes.c_uint32),
        ("seed", ctypes.c_uint64), ("timeout", ctypes.c_double),
        *((name, ctypes.c_uint64) for name in ("barriers", "simd_ops", "matrix_ops", "atomics", "switches", "threads", "threadgroups")),
        ("threadgroup_read", ctypes.c_uint64), ("threadgroup_written", ctypes.c_uint64),
        ("threadgroup_loads", _Accesses), ("threadgroup_stores", _Accesses),
        ("threadgroup_bytes", ctypes.c_uint32), ("failed", ctypes.c_uint32), ("fault_offset", ctypes.c_uint64), ("message", ctypes.c_char * 1024),
    )  # fmt: skip


@dataclasses.dataclass
class Argument:
    """One buffer of a launch. A launch lists its buffers in the order of their indices."""

    name: str
    address: int
    bytes: int
    itemsize: int
    flags: int = 0
    before: int = 0
    keep: Any = None  # the owner of the memory


_lock = threading.Lock()


@functools.cache
def _runtime() -> ctypes.CDLL:
    # Global, so that the kernels' libraries find the runtime's functions without linking to it.
    library = ctypes.CDLL(os.fspath(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.mslcpu_allocate.restype = ctypes.c_void_p
    library.mslcpu_allocate.argtypes = [ctypes.c_uint64]
    library.mslcpu_free.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.mslcpu_launch_size.restype = ctypes.c_uint64
    if library.mslcpu_launch_size() != ctypes.sizeof(_Launch):
        raise MslError("launch.py and runtime/abi.h disagree")
    return library


@functools.cache
def _entry(path: pathlib.Path) -> int:
    _runtime()
    library = ctypes.CDLL(os.fspath(path))
    address = ctypes.cast(library.msl_entry, ctypes.c_void_p).value
    assert address
    return address


def allocate(size: int) -> np.ndarray:
    """Map bytes (zeros, lazily) with a gigabyte of inaccessible addresses on either side, so that a stray access cannot hit another buffer."""
    runtime = _runtime()
    address = runtime.mslcpu_allocate(size)
    if not address:
        raise MemoryError(f"mslcpu: no address space for a buffer of {size} bytes")
    owner = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(owner, runtime.mslcpu_free, address, size)
    return np.ctypeslib.as_array(owner) if size else np.empty(0, np.uint8)


def input_argument(name: str, array: np.ndarray, checked: bool) -> Argument:
    """Return the memory of an array as the kernel sees it: from its lowest to its highest element."""
    strides = [s * (n - 1) for s, n in zip(array.strides, array.shape, strict=True)] if array.size else []
    before = -sum(s for s in strides if s < 0)
    after = sum(s for s in strides if s > 0) + array.itemsize if array.size else 0
    address, keep = array.ctypes.data, array
    if checked and before + after <= COPY_BELOW:
        keep = allocate(before + after)
        ctypes.memmove(keep.ctypes.data, address - before, before + after)
        address = keep.ctypes.data + before
    return Argument(name, address, after, array.itemsize, 0, before, keep)


def output_argument(name: str, shape: Sequence[int], dtype: np.dtype, init: Any, checked: bool) -> tuple[Argument, np.ndarray]:
    """Return memory for an output: filled with init, or with the byte 0xFF, which is NaN in every floating-point type."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = allocate(size) if checked else np.empty(size, np.uint8)
    array = memory.view(dtype).reshape(shape)
    if init is not None:
        array[...] = init
    elif size <= COPY_BELOW:
        memory[...] = 0xFF
    flags = WRITABLE | (INITIALIZED if init is not None else 0)
    return Argument(name, memory.ctypes.data, size, dtype.itemsize, flags, 0, memory), array


def output_over_input(name: str, given: Argument, shape: Sequence[int], dtype: np.dtype) -> tuple[Argument, np.ndarray]:
    """Return an output in the memory of an input, and redirect that input to the same address: the kernel receives one pointer twice.

    The memory is a copy of the input, so its owner's array does not change. It belongs to the output alone: its accesses count for the output, and
    reading what another thread has written is a race, whichever pointer reads it.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != given.bytes or given.before:
        raise ValueError(f"[metal_kernel] The output '{name}' of {size} bytes cannot take the memory of '{given.name}' ({given.bytes} bytes).")
    memory = allocate(size)
    ctypes.memmove(memory.ctypes.data, given.address, size)
    given.address, given.bytes, given.keep = memory.ctypes.data, 0, memory
    return Argument(name, memory.ctypes.data, size, dtype.itemsize, WRITABLE | INITIALIZED, 0, memory), memory.view(dtype).reshape(shape)


def run(
    library: pathlib.Path, name: str, arguments: Sequence[Argument], grid: Sequence[int], threadgroup: Sequence[int], options: Options
) -> tuple[_Launch, Any]:
    """Run a kernel to its end, or raise MslError."""
    buffers = (_Buffer * max(1, len(arguments)))(*(_Buffer(a.address, a.before, a.bytes, a.flags, a.itemsize) for a in arguments))
    launch = _Launch(
        entry=_entry(library), buffers=buffers, buffer_count=len(arguments), grid=tuple(grid), threadgroup=tuple(threadgroup),
        checked=options.checked, instructions=options.checked and options.instructions,
        schedule=SCHEDULES.index(options.schedule), strict=options.strict, stack_bytes=options.stack_bytes,
        inexact=options.inexact, tensor_layout=TENSOR_LAYOUTS.index(options.tensor_layout),
        seed=options.seed + 1, timeout=options.timeout,
    )  # fmt: skip
    with _lock:
        failed = _runtime().mslcpu_run(ctypes.byref(launch))
    if failed:
        message = launch.message.decode(errors="replace")
        message = re.sub(r"buffer (\d+)", lambda m: f"buffer '{arguments[int(m[1])].name}'" if int(m[1]) < len(arguments) else m[0], message)
        raise MslError(f"{name}: {message}{_location(library, launch.fault_offset)}")
    return launch, buffers


def accesses_of(counted: _Accesses) -> Accesses:
    """Return the runtime's record as the report's."""
    widths = {2**i: count for i, count in enumerate(counted.instructions) if count}
    return Accesses(widths, counted.lines, counted.cycles, counted.conflicts)


def _location(library: pathlib.Path, offset: int) -> str:
    """Return ' at file:line' of an instruction, with the chain of inlined callers; empty if unknown."""
    tool = symbolizer()
    if not offset or not tool:
        return ""
    # A return address points behind the call; one byte before it is inside the call.
    command = [tool, "--functions=none", "--inlines", f"--obj={library}", hex(offset - 1)]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    frames = [line.strip() for line in text.splitlines() if re.search(r":\d+:\d+$", line)]
    own = [re.sub(r":\d+$", "", f) for f in frames if not f.startswith(os.fspath(INCLUDE)) and not f.startswith("entry:")]
    own = [pathlib.PurePath(f).name for f in own if not f.startswith("??")]
    return f" at {' <- '.join(own)}" if own else ""
