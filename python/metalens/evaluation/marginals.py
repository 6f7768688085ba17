"""Marginals: the mean prediction of a lens over a text. Its distance from the model's mean prediction is the bias of the lens.

A lens may predict every token badly and still be unbiased. To tell bias from uncertainty, average the predictions
first, then compare (Belrose et al. 2023, section 3, fig. 3). No fused operation computes means over rows, so the
probabilities of a bounded chunk of rows are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.evaluation.dirichlet import dirichlet_mle
from metalens.models.sharding import Sharding
from metalens.ops import Head, head_logits
from metalens.ops.chunks import tokens_per_chunk

# The most rows of a chunk: enough for a fast product with U.
ROWS = 256
# The smallest positive float32. A probability that float32 rounds to 0 is positive: the lens has the model's own head.
LEAST = 2.0**-149


@dataclass(frozen=True, eq=False)
class LogitStats:
    """Mean predictions of each layer over a text, in float64. The fields are those of upstream's LogitStats.

    Attributes:
        n: number of positions.
        marginal_probs: [L, V] mean probability of each token.
        sufficient_stats: [L, V] mean log-probability of each token, in nats. With n, it determines the Dirichlet
            distribution of greatest likelihood.
    """

    n: int
    marginal_probs: np.ndarray
    sufficient_stats: np.ndarray

    def mle(self, layer: int) -> np.ndarray:
        """Return the concentration [V] of the Dirichlet distribution that gives a layer's predictions the greatest likelihood.

        Raises:
            InvalidValueError: if all predictions are the same: there is no such distribution.
        """
        return dirichlet_mle(self.sufficient_stats[layer])


class LogitSums:
    """Sums of one lens's predictions. They take 16 bytes of host memory for each layer and token of the vocabulary, for a text of any length."""

    def __init__(self, num_layers: int, head: Head) -> None:
        self.head = head
        self.n = 0
        self.probs, self.logs = np.zeros((2, num_layers, head.tokens))

    def add(self, rows: mx.array, layers: Sequence[int] | None = None) -> None:
        """Add rows [len(layers), N, D] of some layers (None = all) that are ready for the head.

        All rows go through it once; the probabilities of one chunk are in memory at a time.
        """
        step = min(ROWS, tokens_per_chunk(1, self.head.vocab_size))
        for i, layer in enumerate(range(rows.shape[0]) if layers is None else layers):
            for start in range(0, rows.shape[1], step):
                # NumPy: MLX's exponential takes 25 times as long on Linux CPUs, and a GPU's arrays are in the same memory.
                z = np.array(head_logits(rows[i, start : start + step], self.head))[:, : self.head.tokens]
                top = z.max(axis=1, keepdims=True)
                e = np.exp(z - top)
                total = e.sum(axis=1, keepdims=True, dtype=np.float64)
                self.probs[layer] += (e / total).sum(axis=0)
                self.logs[layer] += z.sum(axis=0, dtype=np.float64) - (top + np.log(total)).sum()
        self.n += rows.shape[1]

    def gather(self, sharding: Sharding) -> None:
        """Take over the sums of the layers that other processes have read."""
        self.probs, self.logs = sharding.gathered(self.probs), sharding.gathered(self.logs)

    def means(self) -> LogitStats:
        """Return the means over the rows so far."""
        return LogitStats(n=self.n, marginal_probs=self.probs / self.n, sufficient_stats=self.logs / self.n)


def bias(model: LogitStats, lens: LogitStats) -> list[float]:
    """Return the bias of every layer: KL(marginal of the model || marginal of the lens), in nats per token.

    Args:
        model: mean predictions of the model, one layer.
        lens: mean predictions of the lens over the same text.
    """
    p, q = model.marginal_probs[0], np.maximum(lens.marginal_probs, LEAST)
    possible = p > 0
    terms = p[possible] * (np.log(p[possible]) - np.log(q[:, possible]))
    return [float(value) for value in terms.sum(axis=1)]
