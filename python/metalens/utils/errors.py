"""Errors that tell a user what was wrong, what was expected and what to do.

Every error that the library raises on purpose is a `MetalensError`, and also the built-in error that a Python user expects. The command line prints
these, and `OSError`, as one line. Any other exception is a bug, and shows its traceback.
"""

from __future__ import annotations


class MetalensError(Exception):
    """Base class of the library's errors."""


class InvalidValueError(MetalensError, ValueError):
    """An argument, a setting, a file or a text has the wrong content."""


class InvalidTypeError(MetalensError, TypeError):
    """An argument has the wrong type."""


class UnavailableError(MetalensError, RuntimeError):
    """This machine or installation lacks a part that was asked for: a backend, a GPU, other processes."""


class MissingPackageError(MetalensError, ImportError):
    """An optional package is not installed."""
