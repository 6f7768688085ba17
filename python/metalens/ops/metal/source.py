"""The Metal sources as text: a header with its includes inlined, and the structures that tell a kernel its problem.

The text lives in the repository's folder metal/, which is installed as metalens/msl; nothing of it is repeated in Python.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np

_INSTALLED = Path(__file__).resolve().parents[2] / "msl"
_IN_REPOSITORY = Path(__file__).resolve().parents[4] / "metal"


@cache
def folder() -> Path:
    """Where the headers are: beside the package, or in the repository it is imported from."""
    for place in (_INSTALLED, _IN_REPOSITORY):
        if (place / "common.h").exists():
            return place
    raise FileNotFoundError(f"The Metal sources are neither in {_INSTALLED} nor in {_IN_REPOSITORY}. Reinstall metalens.")


@cache
def inlined(header: str) -> str:
    """The header's text with those it includes in front of it, each once: Metal compiles strings without a folder to include from."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "([^"]+)"\n', lambda match: expand(match[1]), text, flags=re.MULTILINE)

    return expand(header)


@cache
def fields(header: str, structure: str) -> tuple[tuple[str, str], ...]:
    """((name, type), ...) of a structure of ints and floats, read from the header that defines it."""
    found = re.search(rf"struct {structure} \{{(.*?)\}};", inlined(header), flags=re.DOTALL)
    if found is None:
        raise KeyError(f"{header} defines no struct {structure}.")
    return tuple((name, kind) for kind, name in re.findall(r"^\s*(int|float) (\w+);", found[1], flags=re.MULTILINE))


def pack(header: str, structure: str, values: dict[str, float]) -> np.ndarray:
    """The structure's words as int32, padded to eight: what a kernel reads its problem from.

    Raises:
        KeyError: if the values are not exactly the structure's fields.
    """
    expected = fields(header, structure)
    if {name for name, _ in expected} != set(values):
        raise KeyError(f"{structure} has the fields {[name for name, _ in expected]}, not {sorted(values)}.")
    words = [np.float32(values[name]).view(np.int32) if kind == "float" else np.int32(values[name]) for name, kind in expected]
    return np.array([*words, *[np.int32(0)] * max(0, 8 - len(words))], np.int32)
