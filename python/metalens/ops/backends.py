"""Select how operations run: in plain MLX, on the extension's CPU kernels or on the Metal kernels, and how exactly."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Literal

import mlx.core as mx

from metalens import _extension
from metalens.ops.metal import kernel, tuning
from metalens.ops.scoped_setting import ScopedSetting
from metalens.utils.errors import UnavailableError

Backend = Literal["auto", "reference", "native", "metal"]
Precision = Literal["float32", "bfloat16"]

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native", "metal")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

# Version 0.1.0 called bfloat16 "bf16"; the extension still does.
_BF16: dict[str, Precision] = {"bf16": "bfloat16"}
_EXTENSION_PRECISION: dict[Precision, str] = {"float32": "float32", "bfloat16": "bf16"}

_backend: ScopedSetting[Backend] = ScopedSetting("backend", BACKENDS, "METALENS_BACKEND", "use_backend")
_precision: ScopedSetting[Precision] = ScopedSetting("precision", PRECISIONS, "METALENS_PRECISION", "use_precision", _BF16)


def backend() -> Backend:
    """Return the backend setting: that of `use_backend`, else of METALENS_BACKEND, else 'auto'.

    Raises:
        InvalidValueError: if METALENS_BACKEND has another value.
    """
    return _backend.get()


def use_backend(name: Backend) -> AbstractContextManager[None]:
    """Run the operations that are called inside the `with` block on this backend.

    'auto' selects the fastest backend for the default device: 'native' on a CPU; 'metal' on a GPU, or plain MLX if the model in
    ops/metal/speed.py says that it takes less time. 'reference' is plain MLX.
    An operation that the backend has no kernel for, or whose arguments the kernel does not support, runs in plain MLX.
    The backend is selected when an operation is called, not when its result is evaluated.

    Raises:
        InvalidValueError: on entry of the block, for an unknown name.
        UnavailableError: from an operation: 'native' without the extension, 'metal' without a Metal GPU.
    """
    return _backend.use(name)


def precision() -> Precision:
    """Return the precision setting: that of `use_precision`, else of METALENS_PRECISION, else 'float32'.

    Raises:
        InvalidValueError: if METALENS_PRECISION has another value.
    """
    return _precision.get()


def given_precision() -> Precision | None:
    """Return the precision that `use_precision` or METALENS_PRECISION sets, None if it is the default.

    Raises:
        InvalidValueError: if METALENS_PRECISION has another value.
    """
    return _precision.given()


def use_precision(name: Precision | Literal["bf16"]) -> AbstractContextManager[None]:
    """Set the precision of the operands of the kernels' products inside the `with` block. Sums are always float32.

    'float32' uses the operands unchanged. 'bfloat16' allows the CPU to round them to bfloat16 (2^-9 relative) if it multiplies
    bfloat16 faster (AMX, AVX-512 BF16), and the GPU to round them to float16, which is finer. On other CPUs the two settings
    give the same result. The reference backend ignores the setting. 'bf16' is another spelling of 'bfloat16'.

    Raises:
        InvalidValueError: on entry of the block, for an unknown name.
    """
    return _precision.use(name)


def preferred() -> Literal["reference", "native", "metal"]:
    """Return the backend for the next operation; for 'auto', that of the default device. It may be unavailable here."""
    wanted = backend()
    if wanted != "auto":
        return wanted
    return "native" if mx.default_device().type == mx.DeviceType.cpu else "metal"


def unavailable(name: Literal["native", "metal"]) -> str:
    """Return the reason why a backend can't be used here, or ''. Warn once if 'auto' has to do without the extension.

    Raises:
        UnavailableError: if the backend can't be used and the setting names it, or if METALENS_METAL_TILES asks for what the GPU does not have.
    """
    if name == "native":
        extension, reason = _extension.find()
        if extension is not None:
            return ""
        if backend() == "native":
            raise UnavailableError(f"The native backend was asked for but can't be used: {reason}. Reinstall metalens, or choose 'auto'.")
        _extension.load()  # warns
        return reason
    if mx.metal.is_available() or kernel.is_emulated():
        tuning.check_tiles()
        return ""
    if backend() == "metal":
        raise UnavailableError("The metal backend was asked for, but MLX finds no Metal GPU here. Choose 'auto', or run on a Mac with Apple silicon.")
    return "MLX finds no Metal GPU here"


def native() -> ModuleType | None:
    """Return the extension if the next operation would use it, else None.

    Raises:
        UnavailableError: if the setting is 'native' and the extension can't be used.
    """
    return None if preferred() != "native" or unavailable("native") else extension()


def metal() -> bool:
    """Return whether the next operation would use the Metal kernels.

    Raises:
        UnavailableError: if the setting is 'metal' and MLX finds no Metal GPU.
    """
    return preferred() == "metal" and not unavailable("metal")


def native_by_default() -> bool:
    """Return whether backend 'auto' or 'native' would use the extension on the default device. Never warns or raises for want of it."""
    return preferred() == "native" and _extension.find()[0] is not None


def extension() -> ModuleType:
    """Return the extension. Only for native implementations: `dispatch` has checked that it can be used."""
    found, reason = _extension.find()
    assert found is not None, reason
    return found


def extension_precision() -> str:
    """Return the precision setting in the extension's spelling."""
    return _EXTENSION_PRECISION[precision()]


def rounds_operands() -> bool:
    """Return whether the precision setting allows operands of 16 bits."""
    return precision() == "bfloat16"
