"""The unembedding of a model as data, for the operations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from metalens.ops.weight import Weight
from metalens.utils.errors import InvalidTypeError, InvalidValueError


@dataclass(frozen=True)
class Head:
    """The frozen unembedding of a model: z = f(s * (U n + u0)) + o.

    Attributes:
        weight: U [V, D].
        bias: u0 [V], or None.
        scale: s, the factor of the logits before the softcap.
        softcap: c of f(t) = c * tanh(t / c), or None for a linear head.
        used_rows: number of leading rows of U that belong to tokens. The other rows are padding, with logits of -inf. None = all rows.
        offset: o [V] floats, added to the logits after the softcap, or None. In a head of sampled rows o_v = -log pi_v, with pi_v the
            probability that the sample has row v. An offset of -inf rules a token out. An offset of +inf or NaN makes every row NaN.

    Raises:
        InvalidValueError: if softcap is not positive, used_rows is not from 1 to V, or offset does not have the shape [V].
        InvalidTypeError: if offset does not hold floats.
    """

    weight: Weight
    bias: mx.array | None = None
    scale: float = 1.0
    softcap: float | None = None
    used_rows: int | None = None
    offset: mx.array | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise InvalidValueError(f"softcap must be positive, or None for a linear head; got {self.softcap}.")
        if self.used_rows is not None and not 1 <= self.used_rows <= self.vocab_size:
            raise InvalidValueError(f"used_rows must be from 1 to the head's {self.vocab_size} rows, got {self.used_rows}.")
        if self.offset is not None:
            _check_offset(self.offset, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of U. The tokenizer may have fewer tokens."""
        return self.weight.shape[0]

    @property
    def tokens(self) -> int:
        """Number of ids that can be predicted: 0 <= id < tokens."""
        return self.vocab_size if self.used_rows is None else self.used_rows

    def sampled(self, ids: mx.array, offset: mx.array | None = None) -> Head:
        """Return the head of some rows of U: row i is row ids[i] of this head.

        The rows stay packed. The gathered arrays are lazy; the check of `ids` evaluates them.

        Args:
            ids: [S] the rows, S >= 1, strictly ascending, with 0 <= id < tokens.
            offset: [S] floats to add to the logits, as the field `offset`, or None. An offset of this head is added to it.

        Returns:
            A head of S rows, all of them used.

        Raises:
            InvalidValueError: if ids or offset have another shape, or ids are not ascending tokens.
            InvalidTypeError: if ids are not integers, or offset does not hold floats.
        """
        _check_ids(ids, self.tokens)
        if offset is not None:
            _check_offset(offset, ids.size)

        def rows(a: mx.array | None) -> mx.array | None:
            return None if a is None else mx.take(a, ids, axis=0)

        w = self.weight
        weight = replace(w, values=mx.take(w.values, ids, axis=0), scales=rows(w.scales), biases=rows(w.biases))
        own = rows(self.offset)
        total = offset if own is None else own if offset is None else own.astype(mx.float32) + offset.astype(mx.float32)
        return replace(self, weight=weight, bias=rows(self.bias), used_rows=None, offset=total)


def _check_offset(offset: mx.array, rows: int) -> None:
    if not mx.issubdtype(offset.dtype, mx.floating):
        raise InvalidTypeError(f"offset must hold floats, got {offset.dtype}. Convert it with offset.astype(mx.float32).")
    if offset.shape != (rows,):
        raise InvalidValueError(f"offset must be {(rows,)}, one number for each row of the head, got {offset.shape}.")


def _check_ids(ids: mx.array, tokens: int) -> None:
    if not mx.issubdtype(ids.dtype, mx.integer):
        raise InvalidTypeError(f"ids must be integers, got {ids.dtype}.")
    if ids.ndim != 1 or ids.size == 0:
        raise InvalidValueError(f"ids must be [S] with S >= 1, got {ids.shape}.")
    if not (mx.all(ids[1:] > ids[:-1]) & (ids[0] >= 0) & (ids[-1] < tokens)).item():  # one value to wait for
        raise InvalidValueError(
            f"ids must be strictly ascending, from 0 to {tokens - 1}; got {ids.size} ids from {mx.min(ids).item()} to {mx.max(ids).item()}. "
            "Sort them and remove repeated ids."
        )
