"""Functions of a hidden state that return the state to use instead, for `trace(interventions=...)` and `capture(edits=...)`.

    model.trace(text, interventions={"layers.4": scale(0.5), "layers.6.mlp": zero_out})

The names are mlxterp's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from metalens.models.capture import Edit
from metalens.utils.errors import InvalidValueError


def zero_out(x: mx.array) -> mx.array:
    """Return zeros in the place of x, of any shape."""
    return mx.zeros_like(x)


def scale(factor: float) -> Edit:
    """Return a function that multiplies by a number."""
    return lambda x: (x * factor).astype(x.dtype)


def add_vector(vector: mx.array) -> Edit:
    """Return a function that adds a vector, such as a steering vector.

    Args:
        vector: [D], or any shape that broadcasts to the state's.
    """
    return lambda x: (x + vector).astype(x.dtype)


def replace_with(value: mx.array | float, align: Literal["end", "start", "strict"] = "end") -> Edit:
    """Return a function that puts a value in the state's place, for example that of another text.

    Args:
        value: a number, an array of the state's shape [B, T, D] or with another number of tokens, or any shape that broadcasts to the state's.
        align: tokens to replace if the numbers of tokens differ: the last ones, or the first ones; the other tokens stay as they are. 'strict' =
            an error.

    Returns:
        the function. It raises InvalidValueError for a value whose shape does not fit.

    Raises:
        InvalidValueError: if `align` is another word.
    """
    if align not in ("end", "start", "strict"):
        raise InvalidValueError(f"align must be 'end', 'start' or 'strict', got {align!r}.")

    def edit(x: mx.array) -> mx.array:
        if not isinstance(value, mx.array):
            return mx.full(x.shape, value, dtype=x.dtype)
        if value.shape == x.shape:
            return value.astype(x.dtype)
        same_but_tokens = value.ndim == x.ndim >= 2 and value.shape[:-2] == x.shape[:-2] and value.shape[-1] == x.shape[-1]
        if same_but_tokens and value.shape[-2] > 1:
            if align == "strict":
                raise InvalidValueError(f"The value to put in has shape {value.shape}, and the state {x.shape}. Give align='end' or 'start'.")
            count = min(value.shape[-2], x.shape[-2])
            part = slice(-count, None) if align == "end" else slice(count)
            return _with_tokens(x, part, value[..., part, :].astype(x.dtype))
        try:
            return mx.broadcast_to(value, x.shape).astype(x.dtype)
        except ValueError as error:
            raise InvalidValueError(f"A value of shape {value.shape} does not fit a state of shape {x.shape}.") from error

    return edit


def _with_tokens(x: mx.array, part: slice, value: mx.array) -> mx.array:
    """Return a copy of x [..., T, D] with other values at some tokens."""
    changed = mx.array(x)
    changed[..., part, :] = value
    return changed


def clamp(min_val: float | None = None, max_val: float | None = None) -> Edit:
    """Return a function that limits every number of a state. None = no limit."""

    def edit(x: mx.array) -> mx.array:
        low = x if min_val is None else mx.maximum(x, min_val)
        return (low if max_val is None else mx.minimum(low, max_val)).astype(x.dtype)

    return edit


def noise(std: float = 0.1, seed: int = 0) -> Edit:
    """Return a function that adds Gaussian noise. MLX's own random state is left alone.

    Args:
        std: standard deviation.
        seed: seed of the noise. Every call of the function draws other numbers.
    """
    following = mx.random.key(seed)

    def edit(x: mx.array) -> mx.array:
        nonlocal following
        following, key = mx.random.split(following, 2)
        return (x + std * mx.random.normal(x.shape, key=key)).astype(x.dtype)

    return edit


class InterventionComposer:
    """Puts several functions one after the other: `compose().add(scale(0.5)).add(add_vector(v)).build()`."""

    def __init__(self) -> None:
        self.interventions: list[Edit] = []

    def add(self, fn: Callable[[mx.array], mx.array]) -> InterventionComposer:
        """Add a function, which is applied after those before it. Return the composer."""
        self.interventions.append(fn)
        return self

    def build(self) -> Edit:
        """Return the function that applies all of them, in order."""
        functions = tuple(self.interventions)

        def edit(x: mx.array) -> mx.array:
            for function in functions:
                x = function(x)
            return x

        return edit


compose = InterventionComposer
