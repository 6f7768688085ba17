"""Find the native extension, or the reason why it can't be used.

A missing or mismatched extension costs speed, not correctness: operations fall back to plain MLX. The extension is loaded by
the first operation on a CPU, or by the first model that is opened there; `import metalens` does not load it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from metalens.utils.errors import InvalidValueError

BUILD_INFO = Path(__file__).parent / "_build_info.json"
LIBRARY_INDEX = Path(__file__).parent / "metalens_kernels.json"


@cache
def find() -> tuple[ModuleType | None, str]:
    """Load and check the extension, once per process.

    Returns:
        (the module, ''), or (None, the reason why it can't be used): it was not built, was built for another mlx, is
        damaged, or does not load.

    Raises:
        InvalidValueError: if METALENS_ISA or METALENS_NUM_THREADS has a value that the extension rejects.
    """
    if reason := _unfit():
        return None, reason
    try:
        extension = importlib.import_module("metalens._ext")
        # A wrong nanobind builds and imports, and fails at the first call that takes an array. The product is never evaluated.
        # The calls after it reject an impossible METALENS_ISA or METALENS_NUM_THREADS.
        extension.matmul(mx.zeros((1, 1)), mx.zeros((1, 1)))
        extension.isa()
        extension.num_threads()
    except (ImportError, TypeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and str(error).startswith(("METALENS_ISA=", "METALENS_NUM_THREADS=")):
            raise InvalidValueError(f"{str(error).rstrip('.')}. Change or remove the variable.") from error
        return None, f"it could not be loaded: {error}"
    return extension, ""


def _unfit() -> str:
    """Return why the extension must not be loaded, or ''."""
    try:
        build = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
        built_for = build["mlx"]
    except FileNotFoundError:
        return "it was not built (no _build_info.json beside the package)"
    except OSError as error:
        return f"{BUILD_INFO.name} can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{BUILD_INFO.name} is damaged"
    # Compare before loading: mlx's C++ ABI changes between patch releases, and an extension for another one may crash.
    installed = version("mlx")
    if built_for != installed:
        return f"it was built for mlx {built_for}, and mlx {installed} is installed"
    return _damage(build.get("extension"))


def _damage(built: Any) -> str:
    """Return what is wrong with the file of the extension, or ''. A damaged one can crash the process, or compute something else.

    Args:
        built: {"size": bytes, "sha256": digits} of the file as it was built. None = not known.

    Cost: the file is read once, a few milliseconds.
    """
    if not isinstance(built, dict):
        return ""
    found = importlib.util.find_spec("metalens._ext")
    if found is None or found.origin is None:
        return "its file is missing"
    file = Path(found.origin)
    try:
        if file.stat().st_size == built.get("size") and hashlib.sha256(file.read_bytes()).hexdigest() == built.get("sha256"):
            return ""
    except OSError as error:
        return f"{file.name} can't be read ({error.strerror})"
    return f"{file.name} is damaged: it is not the file that was built"


@cache
def metallib_kernels() -> frozenset[str]:
    """Return the names of the kernels in the metallib; none if the build had no Metal compiler or this machine has no GPU."""
    extension, _ = find()
    if extension is None or not extension.metal_library():
        return frozenset()
    return frozenset(json.loads(LIBRARY_INDEX.read_text()))


def gpu_core_count() -> int:
    """Return the number of the GPU's cores as macOS counts them; 0 if it is not known: without the extension, or without a GPU."""
    extension, _ = find()
    return 0 if extension is None else int(extension.gpu_core_count())


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
