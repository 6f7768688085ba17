"""Layer transfer: how well the translator of one layer reads the hidden states of another (Belrose et al. 2023, section 3.3; upstream's eval)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.evaluation.scores import total
from metalens.lenses.lens import Lens
from metalens.models.unembed import Unembed
from metalens.ops import lens_stats
from metalens.readings.reading import lens_rows, require_finite


@dataclass(frozen=True)
class Transfer:
    """Matrices [L, L], nats per token: entry [i][j] is of translator i applied to the output of block j.

    Attributes:
        ce: cross-entropy of the next token, over all positions that have one. The diagonal is the lens's own.
        kl: KL(lens_j(h_j) || lens_i(h_j)), over all positions: against what layer j's own translator says, not the model (upstream's definition). The
            diagonal is 0.
        kl_model: KL(model || lens_i(h_j)), over all positions.
    """

    ce: list[list[float]]
    kl: list[list[float]]
    kl_model: list[list[float]]

    @property
    def penalty(self) -> list[list[float]]:
        """[i][j]: by how many nats per token the cross-entropy of layer j rises if translator i replaces its own (the paper's transfer penalty)."""
        return [[value - self.ce[j][j] for j, value in enumerate(row)] for row in self.ce]


class TransferSums:
    """Sums of one evaluation, float64. Each sequence of T tokens takes 2 L passes of L T rows through the head; L T rows are held at a time."""

    def __init__(self, layers: int) -> None:
        self.nll, self.kl, self.kl_model = np.zeros((3, layers, layers))
        self.positions = 0
        self.labels = 0

    def add(self, hidden: Sequence[mx.array], lens: Lens, unembed: Unembed, n_model: mx.array, labels: mx.array) -> None:
        """Add a sequence.

        Args:
            hidden: the output of block j at index j, [T, D] each.
            lens: translates and knows L layers.
            unembed: the model's norm and head.
            n_model: [T, D] the model's rows after the final norm.
            labels: [T] next tokens; the last is a stand-in, and left out.

        Raises:
            ValueError: if there is NaN among the logits.
        """
        layers = range(len(hidden))
        for j in layers:
            rows = lens_rows([hidden[j]] * len(hidden), layers, lens, unembed.norm)
            against_own = lens_stats(rows, unembed.head, 1, rows[j], labels)
            require_finite(against_own)
            self.nll[:, j] += total(against_own.nll, slice(-1))
            self.kl[:, j] += total(against_own.kl)
            self.kl_model[:, j] += total(lens_stats(rows, unembed.head, 1, n_model).kl)
        self.positions += len(labels)
        self.labels += len(labels) - 1

    def means(self) -> Transfer:
        """Per token."""
        return Transfer((self.nll / self.labels).tolist(), (self.kl / self.positions).tolist(), (self.kl_model / self.positions).tolist())
