"""Bound the logits that the plain-MLX reference holds at a time, so that its memory does not grow with tokens or layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

# Bytes of one float32 [rows, V] block of logits; the reference holds up to eight such blocks at its peak. On a CPU the
# allocator must be able to reuse a block, and the cache to hold it: page faults on fresh blocks of 64 MB made elementwise
# operations ten times slower than on 8 MB. A GPU needs more rows to be busy.
LOGITS_BYTES = {mx.DeviceType.cpu: 8 * 2**20, mx.DeviceType.gpu: 128 * 2**20}


def tokens_per_chunk(layers: int, vocab_size: int) -> int:
    """Return the number of tokens, at least one, whose logits for all `layers` stay within LOGITS_BYTES."""
    return max(1, LOGITS_BYTES[mx.default_device().type] // (4 * vocab_size * max(layers, 1)))


def in_chunks(function: Callable[..., Sequence[mx.array]], n: mx.array, by_token: Sequence[mx.array | None], vocab_size: int) -> list[mx.array]:
    """Apply `function` to one chunk of tokens after another and join its results along the tokens. Lazy.

    The input of a chunk depends on the results of the chunk before, so that the logits of one chunk are freed before those
    of the next are made.

    Args:
        function: takes rows [L, c, D] and the slices [c, ...] of `by_token`; returns arrays [L, c, ...].
        n: [L, N, D] rows.
        by_token: arrays [N, ...] or None, one entry per token.
        vocab_size: logits per row.

    Returns:
        The results, each [L, N, ...].
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
