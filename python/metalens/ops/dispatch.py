"""Choose the implementation of an operation. One table: operation x backend -> (what it supports, what to call).

An operation has up to three implementations, which take the same arguments:

    reference   plain MLX on any device; supports everything, and is the definition of the operation
    native      the extension's CPU kernels
    metal       the Metal kernels of `ops/metal`

A public function checks its arguments and calls its `Operation`. The backend in force names one implementation. The
operation runs it if it exists, if this machine can run it and if it supports the arguments; else it runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from metalens.ops.backends import preferred, unavailable
from metalens.utils.forked import require_own_threads

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One entry of the table.

    Attributes:
        operation: name of the operation.
        backend: the backend that it belongs to.
        why_not: returns the reason why these arguments are not supported, or ''. It reads shapes and types, never values.
        call: computes the operation.
    """

    operation: str
    backend: Literal["reference", "native", "metal"]
    why_not: Callable[P, str]
    call: Callable[P, R]


_TABLE: dict[str, Operation[..., Any]] = {}


class Operation(Generic[P, R]):
    """One row of the table: an operation and its implementations. Calling it runs the one that `select` returns.

    Args:
        name: name of the operation.
        reference: its definition in plain MLX.
        native, metal: (why_not, call) of an `Implementation`, or None if the backend has no kernel for the operation.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[P, R],
        native: tuple[Callable[P, str], Callable[P, R]] | None = None,
        metal: tuple[Callable[P, str], Callable[P, R]] | None = None,
    ) -> None:
        self.name = name
        self.reference = Implementation(name, "reference", _supports_everything, reference)
        self.kernels: dict[str, Implementation[P, R]] = {}
        if native is not None:
            self.kernels["native"] = Implementation(name, "native", *native)
        if metal is not None:
            self.kernels["metal"] = Implementation(name, "metal", *metal)
        _TABLE[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operation on the backend in force."""
        return self.select(*args, **kwargs)[0].call(*args, **kwargs)

    def select(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Implementation[P, R], str]:
        """Return the implementation for these arguments, and the reason if it is not the one that the backend names.

        Raises:
            UnavailableError: if `use_backend` or METALENS_BACKEND names a backend that this machine lacks, or in a process that was
                forked from one that had used MLX.
        """
        require_own_threads()
        backend = preferred()
        if backend == "reference":
            return self.reference, ""
        kernel = self.kernels.get(backend)
        if kernel is None:
            return self.reference, f"{self.name} has no {backend} kernel"
        reason = unavailable(backend) or kernel.why_not(*args, **kwargs)
        return (self.reference, reason) if reason else (kernel, "")


def _supports_everything(*_: Any, **__: Any) -> str:
    return ""


def operations() -> dict[str, Operation[..., Any]]:
    """Return every operation by its name."""
    return dict(_TABLE)


def implementations() -> list[Implementation[..., Any]]:
    """List the table: every implementation of every operation, the reference first."""
    return [entry for operation in _TABLE.values() for entry in (operation.reference, *operation.kernels.values())]
