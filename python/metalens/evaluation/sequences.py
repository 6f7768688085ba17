"""Values of every sequence of an evaluation, and from them the standard errors of its means.

The tokens of a sequence depend on each other, so a sequence is one observation: the standard error of a mean over tokens is that of a ratio of two
sums over sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalens.models.layers import EMBEDDING, Layer
from metalens.readings.numbering import upstream_layer

# Columns of the sums of a sequence, in the order of `Sums.by_sequence`.
COLUMNS = ("kl", "ce", "entropy", "top1")


@dataclass(frozen=True, eq=False)
class SequenceScores:
    """Values of N sequences, as sums over their tokens, in nats (top1: tokens).

    Attributes:
        positions: [N] positions scored.
        labels: [N] positions with a next token.
        sums: {lens: [N, L, 4]} sums of KL to the model, cross-entropy, entropy and agreement with the model's top token. The lenses are 'model'
            (L = 1), 'logit', and 'tuned' if there is one; with the embedding also 'logit embedding' and 'tuned embedding' (L = 1).
        untranslated: layers that the tuned lens reads as the logit lens does. `sums` have them, files and standard errors leave them out.
    """

    positions: np.ndarray
    labels: np.ndarray
    sums: dict[str, np.ndarray]
    untranslated: tuple[Layer, ...] = ()

    def __len__(self) -> int:
        """Return N."""
        return len(self.positions)

    def _tokens(self, score: str) -> np.ndarray:
        return self.labels if score == "ce" else self.positions

    def means(self, lens: str, score: str) -> np.ndarray:
        """Return the mean over the tokens of each sequence, [N, L]; NaN for a cross-entropy without a next token.

        Args:
            lens: a key of `sums`.
            score: 'kl', 'ce', 'entropy' (nats per token) or 'top1' (0 to 1).
        """
        tokens = self._tokens(score)[:, None].astype(np.float64)
        sums = self.sums[lens][..., COLUMNS.index(score)]
        found: np.ndarray = np.divide(sums, tokens, out=np.full(sums.shape, np.nan), where=tokens > 0)
        return found

    def standard_errors(self, lens: str, score: str) -> np.ndarray | None:
        """Return the standard error of the mean of each layer over all tokens, [L]; None for fewer than two sequences.

        It is NaN for layers that the tuned lens does not translate. Arguments as for `means`.
        """
        n, tokens = len(self), self._tokens(score).astype(np.float64)
        if n < 2:
            return None
        sums = self.sums[lens][..., COLUMNS.index(score)]
        residuals = sums - sums.sum(axis=0) / tokens.sum() * tokens[:, None]
        found: np.ndarray = np.sqrt(n / (n - 1) * np.square(residuals).sum(axis=0)) / tokens.sum()
        found[[row for row, layer in enumerate(self.layers(lens)) if layer in self.left_out(lens)]] = np.nan
        return found

    def layers(self, lens: str) -> list[Layer]:
        """Return the layers of a key of `sums`; of the model its last one."""
        count = self.sums[lens].shape[1]
        return [EMBEDDING] if lens.endswith(f" {EMBEDDING}") else list(range(count))

    def left_out(self, lens: str) -> tuple[Layer, ...]:
        """Return the layers that files leave out for a key of `sums`."""
        return self.untranslated if lens.startswith("tuned") else ()

    def to_upstream(self, nats_to_bpb: float) -> list[dict[str, Any]]:
        """Return the contents of upstream's batches.jsonl, an entry for each sequence: its names, bits per byte, and ITS numbering of layers.

        A sequence without a next token has null for its cross-entropies. "tuned" has only the layers that the lens translates. "tokens" is not in
        upstream's file.
        """
        entries: list[dict[str, Any]] = [{"tokens": int(tokens)} for tokens in self.positions]
        for lens, score in ((lens, score) for lens in self.sums for score in ("ce", "entropy", "kl")):
            if lens == "model" and score == "kl":
                continue
            for entry, values in zip(entries, self.means(lens, score) * nats_to_bpb, strict=True):
                of_lens = entry.setdefault("baseline" if lens == "model" else lens.partition(" ")[0], {}).setdefault(score, {})
                for layer, value in zip(self.layers(lens), values, strict=True):
                    if layer not in self.left_out(lens):
                        of_lens["final" if lens == "model" else f"layer_{upstream_layer(layer)}"] = None if math.isnan(value) else float(value)
        return entries
