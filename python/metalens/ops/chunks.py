"""How many rows of logits exist at a time: the one bound that keeps memory flat in tokens and layers."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

# One float32 [rows, V] block of logits; the plain-MLX reference holds up to eight such blocks at its peak. On the CPU a block must be small enough
# for the allocator to reuse and the cache to hold: page faults on fresh blocks of 64 MB made elementwise operations ten times slower than on 8 MB.
# A GPU wants enough rows to fill it.
LOGITS_BYTES = {mx.DeviceType.cpu: 8 * 2**20, mx.DeviceType.gpu: 128 * 2**20}


def token_chunks(tokens: int, layers: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the token axis such that `layers` rows for each of a slice's tokens stay within LOGITS_BYTES of logits."""
    step = max(1, LOGITS_BYTES[mx.default_device().type] // (4 * vocab_size * max(layers, 1)))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
