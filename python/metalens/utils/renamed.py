"""Old names of attributes and arguments. They work for one more release, with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_attribute(old: str, new: str) -> Any:
    """Return a property that reads the attribute `new` under its old name."""

    def read(self: Any) -> Any:
        _warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(read, doc=f"Old name of `{new}`.")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function accept keyword arguments under their old names: `renamed_arguments(old="new")`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                _warn(f"The argument {old} of {function.__name__}", names[old])
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is called {new} now; the old name will be removed in the next release.", DeprecationWarning, stacklevel=3)
