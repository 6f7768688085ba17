"""Results of analyses as JSON holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from metalens.analysis.resampling import Interval


def as_json(value: Any) -> Any:
    """Return a result as JSON holds it.

    Args:
        value: dataclasses, intervals, mappings, sequences, arrays of NumPy and plain values, in each other.

    Returns:
        dicts, lists and plain values. An `Interval` is {"value", "low", "high"}. NaN and infinity are None. Keys are strings.
    """
    if isinstance(value, Interval):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: as_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
