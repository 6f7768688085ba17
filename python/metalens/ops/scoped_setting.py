"""A setting for the whole process (an environment variable) or for a block of code (a `with` statement)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Generic, TypeVar

from metalens.utils.errors import InvalidValueError

T = TypeVar("T", bound=str)


class ScopedSetting(Generic[T]):
    """A setting with a fixed set of values.

    Args:
        noun: what the setting is, for messages.
        names: the values; the first is the default.
        variable: the environment variable that sets it for the process; an empty variable counts as unset.
        function: name of the function that sets it for a block, for messages.
        aliases: other spellings of some values.
    """

    def __init__(self, noun: str, names: tuple[T, ...], variable: str, function: str, aliases: Mapping[str, T] | None = None) -> None:
        self.noun = noun
        self.names = names
        self.variable = variable
        self.function = function
        self._known: dict[str, T] = {**{name: name for name in names}, **(aliases or {})}
        self._override: ContextVar[T | None] = ContextVar(variable, default=None)

    def get(self) -> T:
        """Return the value in force: that of the innermost block, else of the environment variable, else the default."""
        return self.given() or self.names[0]

    def given(self) -> T | None:
        """Return the value of the innermost block, else of the environment variable, None if neither sets one."""
        override = self._override.get()
        if override is not None:
            return override
        value = os.environ.get(self.variable)
        if not value:
            return None
        if value not in self._known:
            raise InvalidValueError(f"{self.variable}={value!r} is not a valid {self.noun}. {self._choices()}")
        return self._known[value]

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Set the value inside the `with` block, for this thread and the tasks that it starts.

        Raises:
            InvalidValueError: on entry, for an unknown name.
        """
        if name not in self._known:
            raise InvalidValueError(f"{self.function}() got {name!r}, which is not a valid {self.noun}. {self._choices()}")
        token = self._override.set(self._known[name])
        try:
            yield
        finally:
            self._override.reset(token)

    def _choices(self) -> str:
        return f"Choose one of {', '.join(self.names)}."
