"""Combine a fast forward pass with the gradient of a plain one, for operations of the frozen model."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx


def with_gradient_of(plain: Callable[..., mx.array], fast: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return a function that computes `fast(*arrays)` and has the gradient of `plain(*arrays)`.

    The gradient costs a second forward pass. Only the parts of a frozen model use this, and their gradients are rarely needed.
    """

    @mx.custom_function
    def function(*arrays: mx.array) -> mx.array:
        return fast(*arrays)

    @function.vjp
    def _(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(plain, list(primals), [cotangent])[1])

    return cast("Callable[..., mx.array]", function)
