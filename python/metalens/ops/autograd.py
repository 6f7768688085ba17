"""A fast forward pass with the gradient of a plain one: for operations of the frozen model, whose gradients are rarely asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx


def with_gradient_of(plain: Callable[..., mx.array], fast: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A function that computes `fast(*arrays)` and is differentiated as if it were `plain(*arrays)`."""

    @mx.custom_function
    def function(*arrays: mx.array) -> mx.array:
        return fast(*arrays)

    @function.vjp
    def _(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(plain, list(primals), [cotangent])[1])

    return cast("Callable[..., mx.array]", function)
