"""Observe modules during a forward pass: replace their methods for a while, and keep what arrays are at that moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def snapshot(value: Any) -> Any:
    """Return an array that keeps the present values when the model changes `value` in place. Return anything else as it is.

    In MLX an in-place change gives the Python object another value, so a second object for the present value is enough:
    `mx.stop_gradient` makes one without copying the data.
    """
    return mx.stop_gradient(value) if isinstance(value, mx.array) else value


@contextlib.contextmanager
def replaced_methods(modules: Iterable[nn.Module], methods_for: Callable[[type], Mapping[str, Callable[..., Any]]]) -> Iterator[None]:
    """Replace methods of modules inside a `with` block. The class of each module becomes a subclass of the same name.

    Args:
        modules: the modules to change.
        methods_for: a function of a class that returns {name: method} to replace. It is called once for each class.
    """
    originals = [(module, type(module)) for module in modules]
    subclasses: dict[type, type] = {}
    try:
        for module, original in originals:
            if original not in subclasses:
                subclasses[original] = type(original.__name__, (original,), {**methods_for(original), "__module__": original.__module__})
            module.__class__ = subclasses[original]
        yield
    finally:
        for module, original in originals:
            module.__class__ = original
