"""Training text as sequences of tokens, every token of it used."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np


class TokenSequences:
    """An endless supply of equally long sequences from one token stream.

    Sequences start at 0, N, 2N, ...; if a tail remains, the last one ends with the text and overlaps its neighbour, so that no token goes unused.

    Args:
        ids: [tokens], one dimension.
        length: N, tokens per sequence.
        seed: shuffles the sequences anew in each pass; None keeps their order.

    Raises:
        ValueError: if the text is shorter than one sequence.
    """

    def __init__(self, ids: mx.array, length: int, seed: int | None = None) -> None:
        if ids.size < length:
            raise ValueError(f"Dataset too small: {ids.size} tokens, need at least {length}. Provide more text data, or lower max_seq_len.")
        self.ids = ids
        self.length = length
        self.seed = seed
        self.starts = list(range(0, ids.size - length + 1, length))
        if self.starts[-1] + length < ids.size:
            self.starts.append(ids.size - length)

    def __len__(self) -> int:
        """Sequences in one pass over the text."""
        return len(self.starts)

    def __iter__(self) -> Iterator[mx.array]:
        """Sequences [1, N], pass after pass, without end."""
        order = np.arange(len(self.starts))
        rng = None if self.seed is None else np.random.default_rng(self.seed)
        while True:
            if rng is not None:
                rng.shuffle(order)
            for i in order:
                start = self.starts[i]
                yield self.ids[None, start : start + self.length]
