"""A setting that the user may make for the process, by a variable, or for a block of code, by a `with` statement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

from metalens.utils.errors import InvalidValueError

T = TypeVar("T", bound=str)


class ScopedSetting(Generic[T]):
    """One of several names.

    Args:
        noun: what is chosen, for messages.
        names: the possible ones; the first is the default.
        variable: the environment variable that chooses for the process; empty means unset.
        function: the name of the function that chooses for a block, for messages.
    """

    def __init__(self, noun: str, names: tuple[T, ...], variable: str, function: str) -> None:
        self.noun = noun
        self.names = names
        self.variable = variable
        self.function = function
        self._override: ContextVar[T | None] = ContextVar(variable, default=None)

    def _checked(self, name: str, where: str) -> T:
        for known in self.names:
            if name == known:
                return known
        raise InvalidValueError(f"{where} names no {self.noun}: {name!r}. Choose one of {', '.join(self.names)}.")

    def get(self) -> T:
        """The name in force: the innermost block's, else the variable's, else the default."""
        return self._override.get() or self._checked(os.environ.get(self.variable) or self.names[0], f"The variable {self.variable}")

    @contextlib.contextmanager
    def use(self, name: T) -> Iterator[None]:
        """Choose for the length of a `with` block, in this thread and the tasks it starts."""
        token = self._override.set(self._checked(name, f"{self.function}()"))
        try:
            yield
        finally:
            self._override.reset(token)
