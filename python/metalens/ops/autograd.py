"""Combine a fast forward pass with the gradient of a plain one, for operations of the frozen model."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx


def with_gradient_of(plain: Callable[[mx.array], mx.array], fast: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Return a function that computes `fast(x)` and has the gradient of `plain(x)`.

    The gradient costs a second forward pass. Only the parts of a frozen model use this, and their gradients are rarely needed.
    """

    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        return fast(x)

    @function.vjp
    def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return mx.vjp(plain, [x], [cotangent])[1][0]

    return cast("Callable[[mx.array], mx.array]", function)
