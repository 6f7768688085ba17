"""The final norm of a model as data, for the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx


@dataclass(frozen=True)
class Norm:
    """The frozen final norm of a model: a callable on rows [..., D].

    Attributes:
        function: the norm as the model runs it.
        kind: the formula, if the kernels know it; None = only `function` can compute the norm.
        weight, bias: [D] or None.
        eps: added to the mean square ('rms') or to the variance ('layer').
    """

    function: Callable[[mx.array], mx.array]
    kind: Literal["rms", "layer", "none"] | None = None
    weight: mx.array | None = None
    bias: mx.array | None = None
    eps: float = 0.0

    def __call__(self, h: mx.array) -> mx.array:
        """Return the normed rows."""
        return self.function(h)
