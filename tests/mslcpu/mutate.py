"""Mutate kernels, to test their tests: a kernel without one of its barriers must fail the checks."""

from __future__ import annotations

import re

_BARRIER = re.compile(r"\b(?:metal\s*::\s*)?(?:threadgroup_barrier|simdgroup_barrier)\s*\([^;{}]*?\)\s*;")


def _barriers(text: str) -> list[re.Match[str]]:
    # Comments are blanked, not removed, so that positions do not change.
    bare = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    return list(_BARRIER.finditer(bare))


def count_barriers(text: str) -> int:
    """Return the number of threadgroup_barrier and simdgroup_barrier statements in a source or header."""
    return len(_barriers(text))


def without_barrier(text: str, index: int) -> str:
    """Return the text without its index-th barrier statement."""
    match = _barriers(text)[index]
    return text[: match.start()] + ";" + text[match.end() :]
