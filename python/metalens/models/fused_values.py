"""Which rows of a fused matrix of queries, keys and values are the values of each head: found by watching the attention, not by its layout.

The layouts differ: queries, keys and values one after another (GPT-2, Phi-3), head by head (GPT-NeoX), or in groups (InternLM 2). On a text of
one token an attention's weights are all 1, so what goes into the output matrix is the value. If the fused matrix puts out its own row numbers,
these are the rows of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.models.observing import replaced_methods
from metalens.models.unembed import merged
from metalens.ops import Weight
from metalens.utils.errors import InvalidValueError

SCALE = 2.0**-20  # of the row numbers: so small that an attention that clips its values leaves them


def value_rows(attention: nn.Module, output: nn.Module, hidden_size: int) -> tuple[Weight, np.ndarray]:
    """Return the fused matrix of an attention, and the row of it that each input of the output matrix comes from, int [I].

    Args:
        attention: the attention. It is run on one token.
        output: the layer of its output matrix.
        hidden_size: D.

    Raises:
        InvalidValueError: if no layer of the attention is a fused matrix whose rows go into the output matrix unchanged. If the attention itself
            raised an error, that is its cause.
    """
    children: dict[str, Any] = attention.children()
    candidates = {
        name: child for name, child in children.items() if isinstance(child, nn.Module) and child is not output and _reads(child, hidden_size)
    }
    cause: Exception | None = None
    for fused in candidates.values():
        weight = Weight.from_layer(merged(fused))
        try:
            found = _watched(attention, output, fused, weight.shape[0], hidden_size)
        except Exception as error:  # the attention of another architecture may need more than hidden states
            cause = error
            continue
        if found is not None:
            return weight, found
    raise InvalidValueError(
        f"no matrix of the attention (tried: {', '.join(candidates) or 'none'}) has rows that go into its output matrix unchanged"
    ) from cause


def _reads(module: nn.Module, hidden_size: int) -> bool:
    """Return whether a module is a matrix of D inputs."""
    plain = merged(module)
    return "weight" in plain and plain["weight"].ndim == 2 and Weight.from_layer(plain).shape[1] == hidden_size


def _watched(attention: nn.Module, output: nn.Module, fused: nn.Module, count: int, hidden_size: int) -> np.ndarray | None:
    """Return what goes into the output matrix if the fused one puts out its row numbers, None if these are no row numbers."""
    seen: list[mx.array] = []
    numbers = mx.arange(1, count + 1, dtype=mx.float32) * SCALE

    def methods_for(kind: type) -> Mapping[str, Callable[..., Any]]:
        def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            if self is fused:
                return mx.broadcast_to(numbers, (*x.shape[:-1], count))
            seen.append(x)
            return kind.__call__(self, x, *args, **kwargs)

        return {"__call__": call}

    with replaced_methods([fused, output], methods_for):
        attention(mx.zeros((1, 1, hidden_size)))
        rows = np.array(seen[0].astype(mx.float32)).reshape(-1) / SCALE - 1 if seen else np.zeros(0)
    if not rows.size or not np.isfinite(rows).all():
        return None
    whole = rows.astype(np.int64)
    return whole if np.array_equal(rows, whole) and whole.min() >= 0 and whole.max() < count else None
