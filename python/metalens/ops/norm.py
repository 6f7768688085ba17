"""The final norm of a model, as the operations take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx


@dataclass(frozen=True)
class Norm:
    """The final norm of a model, frozen: a callable on [..., D].

    Attributes:
        function: the norm as the model runs it.
        kind: what it computes, if that is something the kernels know; None = only `function` knows.
        weight, bias: [D] or None.
        eps: added to the mean square ('rms') or the variance ('layer').
    """

    function: Callable[[mx.array], mx.array]
    kind: Literal["rms", "layer", "none"] | None = None
    weight: mx.array | None = None
    bias: mx.array | None = None
    eps: float = 0.0

    def __call__(self, h: mx.array) -> mx.array:
        """The normed rows."""
        return self.function(h)
