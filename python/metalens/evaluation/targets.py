"""What the predictions of a sequence are scored against: for each position a token of the text, and the model's own prediction of that token."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.models.capture import HiddenStates
from metalens.models.layers import Layer


@dataclass(frozen=True)
class Targets:
    """The positions of a sequence that are scored, N in number, and what each is scored against.

    With a token_shift s the lens's prediction at position t is scored against the token at t + s, and against the model's prediction of that token,
    which is at t + s - 1. Positions without the latter are left out. s = 1 is the next token, and the model's prediction at the same position.

    Attributes:
        at: [N] the positions; None = all of the sequence.
        partners: [N] positions of the model's predictions; None = all of the sequence.
        labels: [N] tokens.
        unlabeled: number of positions at the end, 0 or 1, whose token is beyond the sequence. Their label is a placeholder.
    """

    at: mx.array | None
    partners: mx.array | None
    labels: mx.array
    unlabeled: int

    @classmethod
    def of(cls, ids: mx.array, counted: np.ndarray | None, token_shift: int) -> Targets:
        """Return the targets of a sequence of ids [T].

        Args:
            ids: the tokens.
            counted: whether the lens's prediction at each position counts, bool [T]; None = all count.
            token_shift: s.
        """
        length, ahead = len(ids), token_shift - 1
        following = mx.concatenate([ids[1:], ids[:1]])
        if counted is None and ahead == 0:
            return cls(None, None, following, 1)
        counts = np.ones(length, bool) if counted is None else counted.copy()
        partner = np.arange(length) + ahead
        counts &= (partner >= 0) & (partner < length)
        at = np.flatnonzero(counts).astype(np.int32)
        partners = mx.array(at + np.int32(ahead))
        return cls(mx.array(at), partners, following[partners], int(at.size > 0 and at[-1] + ahead == length - 1))

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def rows(self, captured: HiddenStates, layer: Layer) -> mx.array:
        """Return the hidden states [N, D] of a layer that the lens reads."""
        return captured.rows(layer, self.at)

    def model_rows(self, captured: HiddenStates) -> mx.array:
        """Return the model's last hidden states [N, D], whose predictions the lens is compared with."""
        return captured.rows(-1, self.partners)
