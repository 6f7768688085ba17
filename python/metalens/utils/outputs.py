"""Outputs replace only files of their own kind, unless the caller insists, and never the inputs of the same call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from metalens.utils.errors import InvalidValueError

# The first bytes of pictures. An SVG picture may begin with a declaration.
PICTURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"%PDF",
    b"%!PS",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"RIFF",
    b"\x1f\x8b",
    b"<svg",
    b"<?xml",
    b"%% Creator: Matplotlib",
)


class NotOursError(InvalidValueError):
    """A file would be replaced that metalens did not write."""


class Output(NamedTuple):
    """A file that is going to be written.

    Attributes:
        path: path of the file.
        kind: the kind of file, for the error: 'a lens'.
        recognizes: function that returns whether an existing file is of this kind.
    """

    path: Path
    kind: str
    recognizes: Callable[[Path], bool]


def require_replaceable(outputs: Iterable[Output], *, force: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Check that outputs do not exist, are empty, or are of their own kind, and that none is an input.

    Args:
        outputs: the files that are going to be written.
        force: accept files of another kind, but never inputs.
        inputs: files that the same call reads.

    Raises:
        NotOursError: if a file is of another kind. It names the file.
        InvalidValueError: if an output is also an input.
        OSError: if a file can't be read.
    """
    read = [Path(name) for name in inputs]
    for output in outputs:
        for name in read:
            with contextlib.suppress(OSError):
                if os.path.samefile(output.path, name):
                    raise InvalidValueError(f"{output.path} is read and would be replaced by {output.kind}. Give another path for the result.")
        if force or not output.path.is_file() or not output.path.stat().st_size:
            continue
        if not output.recognizes(output.path):
            raise NotOursError(
                f"{output.path} exists and is not {output.kind}: metalens does not replace what it did not write. "
                "Give another path, or replace it with --force (force=True in Python)."
            )


def is_picture(path: Path) -> bool:
    """Return whether a file begins as pictures do."""
    with path.open("rb") as file:
        return file.read(32).startswith(PICTURES)


def picture_output(path: str | Path) -> Output:
    """Return a picture that is going to be written."""
    return Output(Path(path), "a picture", is_picture)
