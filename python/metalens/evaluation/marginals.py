"""Marginals: what a lens predicts on average over a text, and how far that is from the model's average, the bias of the lens.

A lens may predict every token badly and still be unbiased, and a bias can be told apart from mere uncertainty only by averaging before comparing
(Belrose et al. 2023, section 3, fig. 3). There is no fused operation for means over rows, so probabilities exist here, of a bounded chunk of
rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metalens.evaluation.dirichlet import dirichlet_mle
from metalens.ops import Head, head_logits
from metalens.ops.chunks import tokens_per_chunk

# Rows of a chunk at most: enough for the product with U to be fast.
ROWS = 256
# The least positive float32. A probability that float32 rounds to 0 is not 0: the lens has the model's own head.
LEAST = 2.0**-149


@dataclass(frozen=True, eq=False)
class LogitStats:
    """The mean of a prediction over a text, per layer; float64 (the fields of upstream's LogitStats).

    Attributes:
        n: positions.
        marginal_probs: [L, tokens] mean probability of each token.
        sufficient_stats: [L, tokens] mean log-probability in nats: with n, all that the Dirichlet distribution of greatest likelihood depends on.
    """

    n: int
    marginal_probs: np.ndarray
    sufficient_stats: np.ndarray

    def mle(self, layer: int) -> np.ndarray:
        """The concentration [tokens] of the Dirichlet distribution that a layer's predictions most likely come from.

        Raises:
            ValueError: if they are all the same, and there is none.
        """
        return dirichlet_mle(self.sufficient_stats[layer])


class LogitSums:
    """The sums of one lens. Host memory: 16 bytes for each layer and token of the vocabulary, whatever the length of the text."""

    def __init__(self, layers: int, head: Head) -> None:
        self.head = head
        self.n = 0
        self.probs, self.logs = np.zeros((2, layers, head.tokens))

    def add(self, rows: mx.array) -> None:
        """Add rows [L, N, D] that are ready for the head. Takes one pass of all rows through it; a chunk's probabilities exist at a time."""
        step = min(ROWS, tokens_per_chunk(1, self.head.vocab_size))
        for layer in range(rows.shape[0]):
            for start in range(0, rows.shape[1], step):
                # In NumPy: MLX's exponential takes 25 times as long on Linux CPUs, and a GPU's arrays are in the same memory.
                z = np.array(head_logits(rows[layer, start : start + step], self.head))[:, : self.head.tokens]
                top = z.max(axis=1, keepdims=True)
                e = np.exp(z - top)
                total = e.sum(axis=1, keepdims=True, dtype=np.float64)
                self.probs[layer] += (e / total).sum(axis=0)
                self.logs[layer] += z.sum(axis=0, dtype=np.float64) - (top + np.log(total)).sum()
        self.n += rows.shape[1]

    def means(self) -> LogitStats:
        """Over the rows so far."""
        return LogitStats(self.n, self.probs / self.n, self.logs / self.n)


def bias(model: LogitStats, lens: LogitStats) -> list[float]:
    """KL(marginal of the model || marginal of the lens) of every layer, in nats per token.

    Args:
        model: the model's own, of one layer.
        lens: over the same text.
    """
    p, q = model.marginal_probs[0], np.maximum(lens.marginal_probs, LEAST)
    possible = p > 0
    terms = p[possible] * (np.log(p[possible]) - np.log(q[:, possible]))
    return [float(value) for value in terms.sum(axis=1)]
