"""Layer transfer: how well the translator of one layer reads the hidden states of another layer.

Source: Belrose et al. 2023, section 3.3; upstream's `tuned-lens eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.evaluation.scores import total
from metalens.lenses.lens import Lens
from metalens.models.layers import EMBEDDING, Layer
from metalens.models.sharding import Sharding
from metalens.models.unembed import Unembed
from metalens.ops import lens_stats
from metalens.readings.rows import lens_rows, require_finite


@dataclass(frozen=True)
class Transfer:
    """Matrices [R, R] in nats per token. Entry [i][j] is a mean for the translator of layers[i], applied to the hidden states of layers[j].

    Attributes:
        ce: cross-entropy of the next token, over all positions that have one. The diagonal is the lens's own
            cross-entropy.
        kl: KL(lens_j(h_j) || lens_i(h_j)), over all positions. The reference is layer j's own translator, not the model
            (upstream's definition), so the diagonal is 0.
        kl_model: KL(model || lens_i(h_j)), over all positions.
        layers: the layers that the lens translates, 'embedding' first if it is among them. () = the outputs of all R blocks.
    """

    ce: list[list[float]]
    kl: list[list[float]]
    kl_model: list[list[float]]
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers) or tuple(range(len(self.ce))))

    @property
    def penalty(self) -> list[list[float]]:
        """Return the paper's transfer penalty: [i][j] is the rise of layer j's cross-entropy, in nats per token, if translator i replaces its own."""
        return [[value - self.ce[j][j] for j, value in enumerate(row)] for row in self.ce]


def translated_remark(transfer: Transfer, num_layers: int | None) -> str | None:
    """Say in a sentence how many layers the matrices are about; None if the lens translates all blocks of the model, or this is not known."""
    blocks = sum(layer != EMBEDDING for layer in transfer.layers)
    return None if num_layers is None or blocks == num_layers else f"The {len(transfer.layers)} layers that the lens translates."


class TransferSums:
    """Sums of one evaluation, in float64.

    Cost: for R layers each sequence of T tokens takes 2 R passes of R T rows through the head. R T rows are in memory at a time.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.nll, self.kl, self.kl_model = np.zeros((3, len(self.layers), len(self.layers)))
        self.positions = 0
        self.labels = 0

    def add(
        self,
        hidden: Callable[[Layer], mx.array],
        lens: Lens,
        unembed: Unembed,
        n_model: mx.array,
        labels: mx.array,
        unlabeled: int = 1,
        read: Sequence[Layer] | None = None,
    ) -> None:
        """Add positions of a sequence.

        Args:
            hidden: a function of a layer that returns its hidden states [T, D].
            lens: a lens that translates the layers.
            unembed: norm and head of the model.
            n_model: [T, D] rows of the model after the final norm that the lens is compared with.
            labels: [T] next tokens.
            unlabeled: number of labels at the end that are placeholders and are left out.
            read: layers whose hidden states are read. None = all.

        Raises:
            InvalidValueError: if a row of logits is NaN.
        """
        for j in range(len(self.layers)) if read is None else map(self.layers.index, read):
            h = hidden(self.layers[j])
            rows = lens_rows(dict.fromkeys(self.layers, h), self.layers, lens, unembed.norm)
            against_own = lens_stats(rows, unembed.head, 1, rows[j], labels)
            require_finite(against_own)
            self.nll[:, j] += total(against_own.nll, slice(len(labels) - unlabeled))
            self.kl[:, j] += total(against_own.kl)
            self.kl_model[:, j] += total(lens_stats(rows, unembed.head, 1, n_model).kl)
        self.positions += len(labels)
        self.labels += len(labels) - unlabeled

    def gather(self, sharding: Sharding) -> None:
        """Take over the sums of the layers that other processes have read: those of `sharding.layers_of(self.layers)`."""
        self.nll, self.kl, self.kl_model = (sharding.gathered(np.ascontiguousarray(sums.T)).T for sums in (self.nll, self.kl, self.kl_model))

    def means(self) -> Transfer:
        """Return the means per token."""
        return Transfer(
            ce=(self.nll / self.labels).tolist(),
            kl=(self.kl / self.positions).tolist(),
            kl_model=(self.kl_model / self.positions).tolist(),
            layers=self.layers,
        )
