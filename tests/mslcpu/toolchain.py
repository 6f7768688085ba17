"""Find the compiler: clang 19 or later, because earlier versions have no arithmetic on bfloat."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys

MINIMUM = 19


def _version(command: str) -> int | None:
    try:
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"clang version (\d+)", text)
    return int(match[1]) if match and "Apple" not in text else None


@functools.cache
def find_clang() -> tuple[str | None, str]:
    """Return the compiler's path and an empty string, or None and the reason."""
    chosen = os.environ.get("MSLCPU_CLANG")
    candidates = [chosen] if chosen else [*(f"clang-{n}" for n in range(MINIMUM, MINIMUM + 10)), "clang"]
    seen = []
    for candidate in candidates:
        path = shutil.which(candidate)
        if not path:
            continue
        version = _version(path)
        if version is not None and version >= MINIMUM:
            return path, ""
        seen.append(f"{path} is {'not an LLVM clang' if version is None else f'version {version}'}")
    return None, f"no clang >= {MINIMUM} ({'; '.join(seen) or 'none of ' + ', '.join(candidates) + ' found'}); set MSLCPU_CLANG"


@functools.cache
def clang() -> str:
    path, reason = find_clang()
    if path is None:
        raise RuntimeError(f"mslcpu: {reason}")
    return path


@functools.cache
def clang_identity() -> str:
    """Return a text that changes with the compiler."""
    return subprocess.run([clang(), "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def symbolizer() -> str | None:
    """Return the path of llvm-symbolizer, of the same version if there is one. Without it errors have no line."""
    match = re.search(r"-(\d+)$", clang())
    names = [f"llvm-symbolizer-{match[1]}"] if match else []
    beside = os.path.join(os.path.dirname(os.path.realpath(clang())), "llvm-symbolizer")
    for name in [*names, beside, "llvm-symbolizer", *(f"llvm-symbolizer-{n}" for n in range(MINIMUM, MINIMUM + 10))]:
        if path := shutil.which(name):
            return path
    return None


@functools.cache
def _processor_flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        line = next((line for line in file if line.startswith("flags")), "")
    return set(line.split())


def unavailable() -> str | None:
    """Return why kernels cannot run here, or None."""
    if not sys.platform.startswith("linux"):
        return f"mslcpu runs on Linux only, not {sys.platform}"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"mslcpu has no fiber switch for {platform.machine()}"
    if platform.machine() == "x86_64" and (missing := {"avx2", "fma", "f16c"} - _processor_flags()):
        return f"mslcpu needs a processor with {', '.join(sorted(missing))}"
    return find_clang()[1] or None
