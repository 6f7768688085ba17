"""attention: scaled dot-product attention of a frozen model's forward pass; on the CPU without a [T, S] matrix."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.autograd import with_gradient_of
from metalens.ops.backends import native, precision
from metalens.ops.weight import FLOATS


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: str | mx.array | None = None, sinks: mx.array | None = None) -> mx.array:
    """`mlx.core.fast.scaled_dot_product_attention` on whichever backend is in use. Lazy; its gradient is plain MLX's.

    Args:
        q: [B, H, T, D] queries.
        k: [B, G, S, D] keys; H is a multiple of G.
        v: [B, G, S, E] values.
        scale: of the products.
        mask: None, "causal" (query i sees the keys up to i + S - T), or an array that broadcasts to [B, H, T, S]: booleans (may see), or numbers
            to add.
        sinks: [H] or None; plain MLX.

    Returns:
        [B, H, T, E] in q's type; the native kernels compute in float32.
    """

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    extension = native()
    if extension is None or sinks is not None or not {q.dtype, k.dtype, v.dtype} <= set(FLOATS) or not _same_for_all(mask):
        return plain(q, k, v)
    causal = isinstance(mask, str)
    added = _added(mask, q.shape[2], k.shape[2]) if isinstance(mask, mx.array) else None

    def fast(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        result: mx.array = extension.attention(q, k, v, scale, causal, added, precision())
        return result

    return with_gradient_of(plain, fast)(q, k, v)


def _same_for_all(mask: str | mx.array | None) -> bool:
    """Whether the native kernels can apply this mask: one for all heads and sequences."""
    if isinstance(mask, mx.array):
        return mask.ndim >= 2 and all(size == 1 for size in mask.shape[:-2])
    return mask in (None, "causal")


def _added(mask: mx.array, queries: int, keys: int) -> mx.array:
    """The mask as numbers [T, S] to add."""
    last_two = mask.reshape(mask.shape[-2:])
    if last_two.dtype == mx.bool_:
        last_two = mx.where(last_two, 0.0, -mx.inf)
    return mx.broadcast_to(last_two.astype(mx.float32), (queries, keys))
