"""MLX arrays as Python numbers. MLX types `item()` and `tolist()` as any of several types; here the caller says which."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def to_float(a: mx.array) -> float:
    """The one element of an array, as a float."""
    return float(a.item())  # type: ignore[arg-type]


def to_list(a: mx.array) -> list[Any]:
    """The elements as nested lists; a list also for an array of one dimension."""
    return a.tolist()  # type: ignore[return-value]
