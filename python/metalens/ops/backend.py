"""Which implementation an operation runs: plain MLX (`reference`) or the extension's CPU kernels (`native`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Literal

import mlx.core as mx

from metalens import _extension

Backend = Literal["auto", "reference", "native"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native")
VARIABLE = "METALENS_BACKEND"

_override: ContextVar[Backend | None] = ContextVar("metalens_backend", default=None)


def _checked(name: str, where: str) -> Backend:
    for known in BACKENDS:
        if name == known:
            return known
    raise ValueError(f"{where} names no backend: {name!r}. Choose one of {', '.join(BACKENDS)}.")


def backend() -> Backend:
    """The backend asked for: by `use_backend`, else by METALENS_BACKEND, else 'auto'."""
    return _override.get() or _checked(os.environ.get(VARIABLE) or "auto", f"The variable {VARIABLE}")


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the operations called inside the `with` block on this backend.

    'auto' takes the fastest that is available for the default device; 'native' raises RuntimeError where the extension can't be used.
    The choice is made when an operation is called, not when its result is evaluated.
    """
    token = _override.set(_checked(name, "use_backend()"))
    try:
        yield
    finally:
        _override.reset(token)


def warn_if_slow() -> None:
    """At import: one warning if the extension would be used here and can't be; none where plain MLX was asked for or a GPU is the default."""
    if os.environ.get(VARIABLE, "auto") in ("", "auto") and mx.default_device().type == mx.DeviceType.cpu:
        _extension.load()


def native() -> ModuleType | None:
    """The extension if the next operation should use it, else None."""
    wanted = backend()
    if wanted == "reference":
        return None
    if wanted == "native":
        extension, reason = _extension.find()
        if extension is None:
            raise RuntimeError(f"The native backend was asked for but can't be used: {reason}. Reinstall metalens, or choose 'auto'.")
        return extension
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    return _extension.load()
