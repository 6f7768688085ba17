"""Streams that a run writes to and does not depend on."""

from __future__ import annotations

import contextlib
from typing import Any


class Unbreakable:
    """A stream that drops what can't be written: a full disk, a closed terminal or a reader that has gone must not end a run.

    Args:
        stream: the stream. None = the process has none.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is in the buffer, if that is possible."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Return whether it is a terminal. None is not."""
        return self.stream is not None and bool(self.stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
