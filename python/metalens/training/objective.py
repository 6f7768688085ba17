"""The loss of a layer: what its predictions are compared with.

    kl    KL(model || lens), the model's own prediction at the same position
    ce    cross-entropy of the text's next token

A token_shift s compares the lens's prediction at position t with the model's prediction, or the token, at position t + s of the same sequence.
Positions without such a partner take no part, and the loss is a mean over the others. Source: upstream's `tuned-lens train --loss --token_shift`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from metalens.models.capture import HiddenStates
from metalens.training.config import TrainingConfig
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class Objective:
    """A loss.

    Attributes:
        loss: its name.
        shift: positions from a prediction of the lens to what it is compared with.
    """

    loss: Literal["kl", "ce"] = "kl"
    shift: int = 0

    @classmethod
    def of(cls, config: TrainingConfig) -> Objective:
        """Return the loss of a run."""
        return cls(config.loss, config.shift)

    def pairs(self, batch: HiddenStates) -> tuple[mx.array | None, mx.array | None]:
        """Return the numbers of the lens's tokens and of their partners, [N] each, counted through all B T; (None, None) = the tokens that count.

        A token takes part if it counts and its sequence has the partner.
        """
        if self.shift == 0:
            return None, None
        sequences, length = batch.hidden[-1].shape[:2]
        counts = np.ones((sequences, length), bool) if batch.mask is None else np.array(batch.mask).astype(bool)
        partner = np.arange(length) + self.shift
        counts &= (partner >= 0) & (partner < length)
        at = np.flatnonzero(counts).astype(np.int32)
        return mx.array(at), mx.array(at + np.int32(self.shift))

    def labels(self, batch: HiddenStates, partners: mx.array | None) -> mx.array | None:
        """Return the tokens [N] that cross-entropy is about; None for the KL.

        Args:
            batch: one forward pass.
            partners: the second result of `pairs`.

        Raises:
            InvalidValueError: if the pass does not know its tokens.
        """
        if self.loss == "kl":
            return None
        if batch.ids is None:
            raise InvalidValueError("Cross-entropy needs the token ids of the forward pass. Capture it with ResidualCapture.capture.")
        ids = batch.ids.reshape(-1)
        chosen = batch.counted_tokens if partners is None else partners
        return ids if chosen is None else ids[chosen]


KL = Objective()
