"""Find the native extension, or the reason why it can't be used.

A missing or mismatched extension costs speed, not correctness: operations fall back to plain MLX. The extension is loaded by
the first operation on a CPU, or by the first model that is opened there; `import metalens` does not load it.
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
    """Load and check the extension, once per process.

    Returns:
        (the module, ''), or (None, the reason why it can't be used): it was not built, was built for another mlx, does not
        load, or rejects a METALENS_ISA or METALENS_NUM_THREADS.
    """
    try:
        built_for = json.loads(BUILD_INFO.read_text())["mlx"]
    except FileNotFoundError:
        return None, "it was not built (no _build_info.json beside the package)"
    except (ValueError, KeyError, TypeError):
        return None, f"{BUILD_INFO.name} is damaged"
    # Compare before loading: mlx's C++ ABI changes between patch releases, and an extension for another one may crash.
    installed = version("mlx")
    if built_for != installed:
        return None, f"it was built for mlx {built_for}, and mlx {installed} is installed"
    try:
        extension = importlib.import_module("metalens._ext")
        # A wrong nanobind builds and imports, and fails at the first call that takes an array. The product is never evaluated.
        # The calls after it reject an impossible METALENS_ISA or METALENS_NUM_THREADS.
        extension.matmul(mx.zeros((1, 1)), mx.zeros((1, 1)))
        extension.isa()
        extension.num_threads()
    except (ImportError, TypeError, RuntimeError) as error:
        return None, f"it could not be loaded: {error}"
    return extension, ""


@cache
def metallib_kernels() -> frozenset[str]:
    """Return the names of the kernels in the metallib; none if the build had no Metal compiler or this machine has no GPU."""
    extension, _ = find()
    if extension is None or not extension.metal_library():
        return frozenset()
    return frozenset(json.loads(LIBRARY_INDEX.read_text()))


def load() -> ModuleType | None:
    """Return the extension, or None after a warning, the first time in this process."""
    extension, reason = find()
    if extension is None:
        _warn_once(reason)
    return extension


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"metalens runs without its native extension, because {reason}. Results are the same, the CPU is slower. Reinstall metalens to build it.",
        RuntimeWarning,
        stacklevel=7,  # the caller of the operation, beyond load, unavailable, select, __call__ and the operation
    )
