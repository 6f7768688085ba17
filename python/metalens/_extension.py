"""Finds the native extension, or says in one sentence why there is none.

A missing or mismatched extension costs speed, never the result: callers fall back to plain MLX.
"""

from __future__ import annotations

import importlib
import json
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import mlx.core as mx

BUILD_INFO = Path(__file__).parent / "_build_info.json"
LIBRARY_INDEX = Path(__file__).parent / "metalens_kernels.json"


@cache
def find() -> tuple[ModuleType | None, str]:
    """The extension module and '', or None and the reason why it can't be used."""
    try:
        built_for = json.loads(BUILD_INFO.read_text())["mlx"]
    except FileNotFoundError:
        return None, "it was not built (no _build_info.json beside the package)"
    except (ValueError, KeyError, TypeError):
        return None, f"{BUILD_INFO.name} is damaged"
    # Compared before loading: mlx's C++ ABI changes between patch releases, and loading beside another one may crash.
    installed = version("mlx")
    if built_for != installed:
        return None, f"it was built for mlx {built_for}, and mlx {installed} is installed"
    try:
        extension = importlib.import_module("metalens._ext")
        # A wrong nanobind builds and imports, and fails at the first call that takes an array; an impossible METALENS_ISA fails here too.
        extension.matmul(mx.zeros((1, 1)), mx.zeros((1, 1)))
        extension.isa()
        extension.num_threads()
    except (ImportError, TypeError, RuntimeError) as error:
        return None, f"it could not be loaded: {error}"
    return extension, ""


@cache
def metallib_kernels() -> frozenset[str]:
    """The Metal kernels in the metallib that the build made; none where there was no Metal compiler or there is no GPU."""
    extension, _ = find()
    if extension is None or not extension.metal_library():
        return frozenset()
    return frozenset(json.loads(LIBRARY_INDEX.read_text()))


def load() -> ModuleType | None:
    """The extension, or None after one warning per process."""
    extension, reason = find()
    if extension is None:
        _warn_once(reason)
    return extension


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"metalens runs without its native extension, because {reason}. Results are the same, the CPU is slower. Reinstall metalens to build it.",
        RuntimeWarning,
        stacklevel=4,
    )
