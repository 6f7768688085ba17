"""Mutations for tests of tests: a kernel without one of its barriers must be found out."""

from __future__ import annotations

import re

_BARRIER = re.compile(r"\b(?:metal\s*::\s*)?(?:threadgroup_barrier|simdgroup_barrier)\s*\([^;{}]*?\)\s*;")


def _barriers(text: str) -> list[re.Match[str]]:
    # Comments are blanked, not removed, so that positions stay.
    bare = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    return list(_BARRIER.finditer(bare))


def count_barriers(text: str) -> int:
    """How many threadgroup_barrier and simdgroup_barrier statements a source or header contains."""
    return len(_barriers(text))


def without_barrier(text: str, index: int) -> str:
    """The text with the index-th barrier statement emptied."""
    match = _barriers(text)[index]
    return text[: match.start()] + ";" + text[match.end() :]
