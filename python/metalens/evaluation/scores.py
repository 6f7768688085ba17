"""Means over tokens, and the sums from which they come."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.ops import LensStats
from metalens.readings.reading import require_finite


@dataclass(frozen=True)
class Scores:
    """Means over tokens; nats per token unless said.

    In bits per byte of the text, a number of nats per token is `nats_to_bpb` times as large (upstream reports kl, ce and entropy all three so).

    Attributes:
        kl: KL(model || lens), over all positions.
        ce: cross-entropy of the next token, over all positions that have one.
        bits_per_byte: ce in bits, per byte of the text.
        top1: share of positions where the most likely token is the model's.
        entropy: of the lens's prediction, over all positions.
        kl_bits_per_byte: kl in bits, per byte.
        entropy_bits_per_byte: entropy in bits, per byte.
    """

    kl: float
    ce: float
    bits_per_byte: float
    top1: float
    entropy: float
    kl_bits_per_byte: float
    entropy_bits_per_byte: float


class Sums:
    """Sums over tokens, per layer, in float64."""

    def __init__(self, layers: int) -> None:
        self.kl, self.nll, self.entropy, self.agreements = np.zeros((4, layers))
        self.positions = 0
        self.labels = 0

    def add(self, stats: LensStats) -> None:
        """Add a sequence's statistics [L, T]; the last position's label is a stand-in, and left out.

        Raises:
            ValueError: if there is NaN among them.
        """
        require_finite(stats)
        assert stats.agrees is not None
        self.kl += total(stats.kl)
        self.nll += total(stats.nll, slice(-1))
        self.entropy += total(stats.entropy)
        self.agreements += total(stats.agrees)
        self.positions += stats.lse.shape[1]
        self.labels += stats.lse.shape[1] - 1

    def scores(self, nats_to_bpb: float) -> list[Scores]:
        """The means, per layer."""
        kl, entropy, top1 = (a / self.positions for a in (self.kl, self.entropy, self.agreements))
        ce = self.nll / self.labels
        columns = (kl, ce, ce * nats_to_bpb, top1, entropy, kl * nats_to_bpb, entropy * nats_to_bpb)
        return [Scores(*map(float, values)) for values in zip(*columns, strict=True)]


def total(values: mx.array | None, positions: slice = slice(None)) -> np.ndarray:
    """Sums [L] float64 of [L, T] over these positions."""
    assert values is not None
    sums: np.ndarray = np.array(values)[:, positions].sum(axis=1, dtype=np.float64)
    return sums
