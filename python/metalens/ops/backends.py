"""How an operation runs: plain MLX (`reference`), the extension's CPU kernels (`native`) or the GPU's (`metal`), and how exact their operands are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Literal

import mlx.core as mx

from metalens import _extension
from metalens.ops.metal import kernel
from metalens.ops.scoped_setting import ScopedSetting
from metalens.utils.errors import UnavailableError

Backend = Literal["auto", "reference", "native", "metal"]
Precision = Literal["float32", "bf16"]

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native", "metal")
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")

_backend: ScopedSetting[Backend] = ScopedSetting("backend", BACKENDS, "METALENS_BACKEND", "use_backend")
_precision: ScopedSetting[Precision] = ScopedSetting("precision", PRECISIONS, "METALENS_PRECISION", "use_precision")


def backend() -> Backend:
    """The backend asked for: by `use_backend`, else by METALENS_BACKEND, else 'auto'."""
    return _backend.get()


def use_backend(name: Backend) -> AbstractContextManager[None]:
    """Run the operations called inside the `with` block on this backend.

    'auto' takes the fastest that is available for the default device; 'native' raises RuntimeError where the extension can't be used, 'metal' where
    there is no Metal GPU. Operations without a Metal kernel run in plain MLX there, which has its own.
    The choice is made when an operation is called, not when its result is evaluated.

    Raises:
        ValueError: on entering the block, for another name.
    """
    return _backend.use(name)


def precision() -> Precision:
    """The precision asked for: by `use_precision`, else by METALENS_PRECISION, else 'float32'."""
    return _precision.get()


def use_precision(name: Precision) -> AbstractContextManager[None]:
    """Choose how exact the operands of the native kernels' products are inside the `with` block; sums are float32 in either.

    'float32' takes operands as they are. 'bf16' lets them be rounded to bfloat16 (2^-9 relative) where the CPU multiplies that faster (AMX, AVX-512
    BF16), and to float16 on a GPU, which is finer; elsewhere the two are the same. The reference backend ignores it.

    Raises:
        ValueError: on entering the block, for another name.
    """
    return _precision.use(name)


def native_by_default() -> bool:
    """Return whether backend 'auto' or 'native' would run the extension's CPU kernels on the default device. Does not warn."""
    wanted = backend()
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return (wanted == "native" or (wanted == "auto" and on_cpu)) and _extension.find()[0] is not None


def native() -> ModuleType | None:
    """The extension if the next operation should use it, else None."""
    wanted = backend()
    if wanted in ("reference", "metal"):
        return None
    if wanted == "native":
        extension, reason = _extension.find()
        if extension is None:
            raise UnavailableError(f"The native backend was asked for but can't be used: {reason}. Reinstall metalens, or choose 'auto'.")
        return extension
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    return _extension.load()


def metal() -> bool:
    """Whether the next operation should use the Metal kernels."""
    wanted = backend()
    available = mx.metal.is_available() or kernel.is_emulated()
    if wanted == "metal" and not available:
        raise UnavailableError("The metal backend was asked for, but MLX finds no Metal GPU here. Choose 'auto', or run on a Mac with Apple silicon.")
    return wanted == "metal" or (wanted == "auto" and available and mx.default_device().type == mx.DeviceType.gpu)
