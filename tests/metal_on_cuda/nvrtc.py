"""CUDA's run-time compiler, through ctypes. It needs no GPU and no CUDA headers: `pip install nvidia-cuda-nvrtc` is enough."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ARCHITECTURE = "sm_80"  # for checks without a GPU: the first with bfloat16
PTX = "compute_80"  # the same as text for CUDA's virtual machine, which has no registers to allocate
MOST_REGISTERS = 128  # registers of a thread on an Apple GPU at its lowest occupancy; a kernel that spills here would spill there
INSTRUCTION_BYTES = 16
REGISTER_FILE = 65536  # registers of a multiprocessor, which a threadgroup must fit


class CompilationError(Exception):
    """NVRTC rejected a kernel. The message is its log."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        name: of the kernel.
        image: machine code of one architecture, or PTX.
        registers: of a thread; None for PTX.
        spilled: bytes that a thread moves between registers and memory because it has too few registers.
        stack: bytes of memory that a thread has: spilled registers, and arrays whose indices are known at run time only.
        instructions: of the whole kernel, NVIDIA's.
    """

    name: str
    image: bytes
    registers: int | None
    spilled: int
    stack: int
    instructions: int


def _candidates() -> Iterator[str]:
    if chosen := os.environ.get("METALENS_NVRTC"):
        yield chosen
        return
    for folder in map(Path, sys.path):
        yield from (str(path) for path in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True))
    yield from (str(path) for path in sorted(Path("/usr/local/cuda/lib64").glob("libnvrtc.so.*"), reverse=True))
    if found := ctypes.util.find_library("nvrtc"):
        yield found


@cache
def _library() -> ctypes.CDLL | str:
    """Return NVRTC, or why there is none."""
    tried = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path}: {error}")
    return "; ".join(tried) or "the CUDA compiler NVRTC was not found: pip install nvidia-cuda-nvrtc"


def unavailable() -> str | None:
    """Return why nothing can be compiled here, or None."""
    library = _library()
    return library if isinstance(library, str) else None


def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def version() -> str:
    """Return NVRTC's version."""
    return "{}.{}".format(*_version())


def _call(function: str, *arguments: object) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    if status := getattr(library, function)(*arguments):
        raise RuntimeError(f"{function} failed with status {status}")


def _text_of(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(1, size.value))
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw[: size.value]


def compiled(text: str, name: str, threads: int, architecture: str = ARCHITECTURE) -> Compiled:
    """Compile one kernel to machine code, with no more registers than a thread has on an Apple GPU, or to PTX, which takes a fraction of the time.

    Args:
        text: the whole program.
        name: of its kernel.
        threads: of a threadgroup.
        architecture: of the GPU, or the constant PTX.

    Raises:
        CompilationError: if NVRTC rejects it.
    """
    to_ptx = architecture == PTX
    options = ["--std=c++17", "--device-as-default-execution-space", f"--gpu-architecture={architecture}", "--fmad=true"]
    if not to_ptx:
        options += ["--ptxas-options=-v", f"--maxrregcount={min(MOST_REGISTERS, REGISTER_FILE // threads)}"]
    elif _version() >= (12, 9):
        options.append("--Ofast-compile=max")
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
        except RuntimeError as error:
            raise CompilationError(f"{name}: {_text_of(program, 'ProgramLog').decode(errors='replace').rstrip(chr(0))}") from error
        log = _text_of(program, "ProgramLog").decode(errors="replace")
        image = _text_of(program, "PTX" if to_ptx else "CUBIN")
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))
    if to_ptx:
        return Compiled(name, image, None, 0, 0, 0)
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise CompilationError(f"{name}: NVRTC reports no registers:\n{log}")
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    stack = max((int(n) for n in re.findall(r"(\d+) bytes stack frame", log)), default=0)
    return Compiled(name, image, int(registers[1]), spilled, stack, _instructions(image, name))


def _instructions(image: bytes, name: str) -> int:
    """Return the length of a kernel's section in an ELF file of machine code, in instructions."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]  # name, type, flags, address, offset, bytes
    wanted = f".text.{name}".encode()
    for header in headers:
        start = headers[names][4] + header[0]
        if image[start : image.index(b"\0", start)] == wanted:
            return int(header[5]) // INSTRUCTION_BYTES
    raise CompilationError(f"{name}: its machine code has no section {wanted.decode()}")
