"""Scores of a lens: means over tokens, and the sums that give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.models.sharding import Sharding
from metalens.ops import LensStats
from metalens.readings.rows import require_finite
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class Scores:
    """Means over tokens, in nats per token unless a unit is given.

    `Evaluation.nats_to_bpb` converts nats per token to bits per byte of the text. Upstream reports kl, ce and entropy
    in bits per byte.

    Attributes:
        kl: KL(model || lens), mean over all positions.
        ce: cross-entropy of the next token, mean over all positions that have one.
        bits_per_byte: ce in bits per byte of the text.
        top1: fraction of positions where the lens and the model have the same most likely token, 0 to 1.
        entropy: entropy of the lens's prediction, mean over all positions.
        kl_bits_per_byte: kl in bits per byte of the text.
        entropy_bits_per_byte: entropy in bits per byte of the text.
    """

    kl: float
    ce: float
    bits_per_byte: float
    top1: float
    entropy: float
    kl_bits_per_byte: float
    entropy_bits_per_byte: float


class Sums:
    """Sums over tokens of each layer, in float64.

    Attributes:
        positions: number of positions so far.
        labels: number of positions with a next token so far.
        by_sequence: [L, 4] sums of kl, nll, entropy and agreements of each sequence.
    """

    def __init__(self, num_layers: int) -> None:
        self.kl, self.nll, self.entropy, self.agreements = np.zeros((4, num_layers))
        self.by_sequence: list[np.ndarray] = []
        self.positions = 0
        self.labels = 0

    def add(self, stats: LensStats, unlabeled: int = 1, layers: Sequence[int] | None = None) -> None:
        """Add the statistics of positions of a sequence, with kl, agrees and nll.

        Args:
            stats: statistics [len(layers), T].
            unlabeled: number of positions at the end without a next token, whose nll is left out.
            layers: the layers that they are of. None = all.

        Raises:
            InvalidValueError: if a row of logits is NaN.
        """
        require_finite(stats)
        rows = list(range(len(self.kl)) if layers is None else layers)
        labels = stats.lse.shape[1] - unlabeled
        sums = total(stats.kl), total(stats.nll, slice(labels)), total(stats.entropy), total(stats.agrees)
        self.by_sequence.append(np.zeros((len(self.kl), len(sums))))
        self.by_sequence[-1][rows] = np.stack(sums, axis=1)
        for whole, part in zip((self.kl, self.nll, self.entropy, self.agreements), sums, strict=True):
            whole[rows] += part
        self.positions += stats.lse.shape[1]
        self.labels += labels

    def add_nothing(self) -> None:
        """Add a sequence of which this process reads no layer."""
        self.by_sequence.append(np.zeros((len(self.kl), 4)))

    def gather(self, sharding: Sharding) -> None:
        """Take over the sums of the layers that other processes have read."""
        table = sharding.gathered(np.stack([self.kl, self.nll, self.entropy, self.agreements], axis=1))
        self.kl, self.nll, self.entropy, self.agreements = table.T
        sequences = np.stack(self.by_sequence, axis=1) if self.by_sequence else np.zeros((len(self.kl), 0, 4))
        layers, count = sequences.shape[:2]
        gathered = sharding.gathered(np.ascontiguousarray(sequences.reshape(layers, -1))).reshape(layers, count, 4)
        self.by_sequence = list(np.moveaxis(gathered, 1, 0))

    def scores(self, nats_to_bpb: float) -> list[Scores]:
        """Return the means of each layer.

        Args:
            nats_to_bpb: bits per byte for each nat per token.
        """
        kl, entropy, top1 = (a / self.positions for a in (self.kl, self.entropy, self.agreements))
        ce = self.nll / self.labels
        columns = {
            "kl": kl,
            "ce": ce,
            "bits_per_byte": ce * nats_to_bpb,
            "top1": top1,
            "entropy": entropy,
            "kl_bits_per_byte": kl * nats_to_bpb,
            "entropy_bits_per_byte": entropy * nats_to_bpb,
        }
        return [Scores(**{name: float(column[layer]) for name, column in columns.items()}) for layer in range(len(kl))]


def total(values: mx.array | None, positions: slice = slice(None)) -> np.ndarray:
    """Return the sums [L], in float64, of values [L, T] over these positions.

    Raises:
        InvalidValueError: if `lens_stats` was not asked for these values.
    """
    if values is None:
        raise InvalidValueError("lens_stats computes kl and agrees only with n_model, nll and rank only with labels. Pass both.")
    sums: np.ndarray = np.array(values)[:, positions].sum(axis=1, dtype=np.float64)
    return sums
