"""The unembedding of a model as data, for the operations."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.weight import Weight
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class Head:
    """The frozen unembedding of a model: z = f(s * (U n + u0)).

    Attributes:
        weight: U [V, D].
        bias: u0 [V], or None.
        scale: s, the factor of the logits before the softcap.
        softcap: c of f(t) = c * tanh(t / c), or None for a linear head.
        used_rows: number of leading rows of U that belong to tokens. The other rows are padding, with logits of -inf. None = all rows.

    Raises:
        InvalidValueError: if softcap is not positive, or used_rows is not from 1 to V.
    """

    weight: Weight
    bias: mx.array | None = None
    scale: float = 1.0
    softcap: float | None = None
    used_rows: int | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise InvalidValueError(f"softcap must be positive, or None for a linear head; got {self.softcap}.")
        if self.used_rows is not None and not 1 <= self.used_rows <= self.vocab_size:
            raise InvalidValueError(f"used_rows must be from 1 to the head's {self.vocab_size} rows, got {self.used_rows}.")

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of U. The tokenizer may have fewer tokens."""
        return self.weight.shape[0]

    @property
    def tokens(self) -> int:
        """Number of ids that can be predicted: 0 <= id < tokens."""
        return self.vocab_size if self.used_rows is None else self.used_rows
