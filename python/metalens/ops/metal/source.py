"""Read the Metal sources: a header with its includes inlined, its constants, and the structures that describe a problem to a kernel.

The sources live in the repository's folder metal/, which is installed as metalens/msl. Python repeats nothing of them.
"""

from __future__ import annotations

import re
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

_INSTALLED = Path(__file__).resolve().parents[2] / "msl"
_IN_REPOSITORY = Path(__file__).resolve().parents[4] / "metal"


@cache
def folder() -> Path:
    """Return the folder of the headers: inside the installed package, or in the repository that it is imported from."""
    for candidate in (_INSTALLED, _IN_REPOSITORY):
        if (candidate / "common.h").exists():
            return candidate
    raise FileNotFoundError(f"The Metal sources are neither in {_INSTALLED} nor in {_IN_REPOSITORY}. Reinstall metalens.")


@cache
def inlined(header: str) -> str:
    """Return the header's text after the headers that it includes, each once: Metal compiles strings and has no folder to include from."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "([^"]+)"\n', lambda match: expand(match[1]), text, flags=re.MULTILINE)

    return expand(header)


@cache
def constant(header: str, name: str) -> int:
    """Return the value of `constexpr constant int name = ...;` in the header or in one that it includes: a number, or a product of constants.

    Raises:
        KeyError: if there is no such constant.
    """
    found = re.search(rf"^constexpr constant int {name} = ([\w* ]+);", inlined(header), flags=re.MULTILINE)
    if found is None:
        raise KeyError(f"{header} defines no constant {name}.")
    factors = found[1].split(" * ")
    return prod(int(factor) if factor.isdigit() else constant(header, factor) for factor in factors)


@cache
def fields(header: str, structure: str) -> tuple[tuple[str, str], ...]:
    """Return ((name, type), ...) of a structure of ints and floats, read from the header that defines it.

    Raises:
        KeyError: if there is no such structure.
    """
    found = re.search(rf"struct {structure} \{{(.*?)\}};", inlined(header), flags=re.DOTALL)
    if found is None:
        raise KeyError(f"{header} defines no struct {structure}.")
    return tuple((name, kind) for kind, name in re.findall(r"^\s*(int|float) (\w+);", found[1], flags=re.MULTILINE))


def pack(header: str, structure: str, values: dict[str, float]) -> np.ndarray:
    """Return the words of a structure as int32, padded to eight words: the form in which a kernel reads its problem.

    Raises:
        KeyError: if the values are not exactly the structure's fields.
    """
    expected = fields(header, structure)
    if {name for name, _ in expected} != set(values):
        raise KeyError(f"{structure} has the fields {[name for name, _ in expected]}, not {sorted(values)}.")
    words = [np.float32(values[name]).view(np.int32) if kind == "float" else np.int32(values[name]) for name, kind in expected]
    return np.array([*words, *[np.int32(0)] * max(0, 8 - len(words))], np.int32)
