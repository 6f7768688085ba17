"""Convert MLX arrays to Python numbers. MLX types `item()` and `tolist()` as unions; these functions state one type."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def to_float(a: mx.array) -> float:
    """Return the only element of an array as a float."""
    return float(a.item())  # type: ignore[arg-type]


def to_list(a: mx.array) -> list[Any]:
    """Return the elements as nested lists; an array of one dimension gives a flat list."""
    return a.tolist()  # type: ignore[return-value]
