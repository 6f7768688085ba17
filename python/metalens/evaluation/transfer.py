"""Layer transfer: how well the translator of one layer reads the hidden states of another layer.

Source: Belrose et al. 2023, section 3.3; upstream's `tuned-lens eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.evaluation.scores import total
from metalens.lenses.lens import Lens
from metalens.models.sharding import Sharding
from metalens.models.unembed import Unembed
from metalens.ops import lens_stats
from metalens.readings.rows import lens_rows, require_finite


@dataclass(frozen=True)
class Transfer:
    """Matrices [L, L] in nats per token. Entry [i][j] is a mean for translator i, applied to the output of block j.

    Attributes:
        ce: cross-entropy of the next token, over all positions that have one. The diagonal is the lens's own
            cross-entropy.
        kl: KL(lens_j(h_j) || lens_i(h_j)), over all positions. The reference is layer j's own translator, not the model
            (upstream's definition), so the diagonal is 0.
        kl_model: KL(model || lens_i(h_j)), over all positions.
    """

    ce: list[list[float]]
    kl: list[list[float]]
    kl_model: list[list[float]]

    @property
    def penalty(self) -> list[list[float]]:
        """Return the paper's transfer penalty: [i][j] is the rise of layer j's cross-entropy, in nats per token, if translator i replaces its own."""
        return [[value - self.ce[j][j] for j, value in enumerate(row)] for row in self.ce]


class TransferSums:
    """Sums of one evaluation, in float64.

    Cost: each sequence of T tokens takes 2 L passes of L T rows through the head. L T rows are in memory at a time.
    """

    def __init__(self, num_layers: int) -> None:
        self.nll, self.kl, self.kl_model = np.zeros((3, num_layers, num_layers))
        self.positions = 0
        self.labels = 0

    def add(
        self,
        hidden: Sequence[mx.array],
        lens: Lens,
        unembed: Unembed,
        n_model: mx.array,
        labels: mx.array,
        unlabeled: int = 1,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Add positions of a sequence.

        Args:
            hidden: output of block j at index j, [T, D] each.
            lens: a lens of L layers.
            unembed: norm and head of the model.
            n_model: [T, D] rows of the model after the final norm.
            labels: [T] next tokens.
            unlabeled: number of labels at the end that are placeholders and are left out.
            blocks: blocks whose output is read. None = all.

        Raises:
            InvalidValueError: if a row of logits is NaN.
        """
        layers = range(len(hidden))
        for j in layers if blocks is None else blocks:
            rows = lens_rows([hidden[j]] * len(hidden), layers, lens, unembed.norm)
            against_own = lens_stats(rows, unembed.head, 1, rows[j], labels)
            require_finite(against_own)
            self.nll[:, j] += total(against_own.nll, slice(len(labels) - unlabeled))
            self.kl[:, j] += total(against_own.kl)
            self.kl_model[:, j] += total(lens_stats(rows, unembed.head, 1, n_model).kl)
        self.positions += len(labels)
        self.labels += len(labels) - unlabeled

    def gather(self, sharding: Sharding) -> None:
        """Take over the sums of the blocks that other processes have read."""
        self.nll, self.kl, self.kl_model = (sharding.gathered(np.ascontiguousarray(sums.T)).T for sums in (self.nll, self.kl, self.kl_model))

    def means(self) -> Transfer:
        """Return the means per token."""
        return Transfer(
            ce=(self.nll / self.labels).tolist(),
            kl=(self.kl / self.positions).tolist(),
            kl_model=(self.kl_model / self.positions).tolist(),
        )
