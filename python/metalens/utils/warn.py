"""Warnings that point to the user's line."""

from __future__ import annotations

import sys
import warnings

# functools stands between a cached property and its user.
_SKIPPED = {"metalens", "functools", "contextlib"}


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line outside metalens, however many of its functions are in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
