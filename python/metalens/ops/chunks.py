"""How many rows of logits the plain-MLX reference holds at a time: the one bound that keeps its memory flat in tokens and layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

# One float32 [rows, V] block of logits; the reference holds up to eight such blocks at its peak. On the CPU a block must be small enough for the
# allocator to reuse and the cache to hold: page faults on fresh blocks of 64 MB made elementwise operations ten times slower than on 8 MB. A GPU
# wants enough rows to fill it.
LOGITS_BYTES = {mx.DeviceType.cpu: 8 * 2**20, mx.DeviceType.gpu: 128 * 2**20}


def tokens_per_chunk(layers: int, vocab_size: int) -> int:
    """So many tokens that `layers` rows for each stay within LOGITS_BYTES of logits; at least one."""
    return max(1, LOGITS_BYTES[mx.default_device().type] // (4 * vocab_size * max(layers, 1)))


def in_chunks(function: Callable[..., Sequence[mx.array]], n: mx.array, by_token: Sequence[mx.array | None], vocab_size: int) -> list[mx.array]:
    """function(n [L, c, D], *by_token [c, ...]) of one chunk of tokens after another, its results [L, c, ...] joined along the tokens. Lazy.

    Each chunk's input is made to depend on the results of the chunk before, so that one chunk's logits are gone before the next one's are made.
    """
    layers, tokens = n.shape[:2]
    step = tokens_per_chunk(layers, vocab_size)
    parts: list[Sequence[mx.array]] = []
    for start in range(0, max(tokens, 1), step):
        rows = n[:, start : start + step]
        if parts:
            (rows,) = mx.depends([rows], list(parts[-1]))
        parts.append(function(rows, *(None if a is None else a[start : start + step] for a in by_token)))
    return [mx.concatenate(list(results), axis=1) for results in zip(*parts, strict=True)]
