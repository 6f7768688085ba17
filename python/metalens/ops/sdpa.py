"""attention: scaled dot-product attention for the forward pass of a frozen model; on a CPU without a [T, S] matrix."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.autograd import with_gradient_of
from metalens.ops.backends import extension, extension_precision
from metalens.ops.dispatch import Operation
from metalens.ops.weight import FLOATS


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: str | mx.array | None = None, sinks: mx.array | None = None) -> mx.array:
    """Return `mlx.core.fast.scaled_dot_product_attention` of the same arguments. Lazy; the gradient is plain MLX's.

    Args:
        q: [B, H, T, D] queries.
        k: [B, G, S, D] keys; H is a multiple of G.
        v: [B, G, S, E] values.
        scale: factor of the products of queries and keys.
        mask: None; "causal" (query i sees the keys up to i + S - T); or an array that broadcasts to [B, H, T, S], of booleans
            (True = visible) or of numbers to add.
        sinks: [H] or None. Only plain MLX supports them.

    Returns:
        [B, H, T, E] in the type of q. The native kernels compute in float32.
    """
    return _ATTENTION(q, k, v, scale, mask, sinks)


def _reference(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array | None, sinks: mx.array | None) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def _native(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array | None, sinks: mx.array | None) -> mx.array:
    ours = extension().attention
    added = _as_numbers(mask, q.shape[2], k.shape[2]) if isinstance(mask, mx.array) else None
    operands = extension_precision()

    def fast(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        y: mx.array = ours(q, k, v, scale, isinstance(mask, str), added, operands)
        return y

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return _reference(q, k, v, scale, mask, sinks)

    return with_gradient_of(plain, fast)(q, k, v)


def _why_not_native(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array | None, sinks: mx.array | None) -> str:
    if sinks is not None:
        return "the kernels have no sinks"
    if not {q.dtype, k.dtype, v.dtype} <= set(FLOATS):
        return f"the kernels read no q, k, v of {q.dtype}, {k.dtype}, {v.dtype}"
    if isinstance(mask, mx.array):
        same_for_all = mask.ndim >= 2 and all(size == 1 for size in mask.shape[:-2])
        return "" if same_for_all else "the kernels take one mask for all heads and sequences"
    return "" if mask in (None, "causal") else f"the kernels have no mask {mask!r}"


def _as_numbers(mask: mx.array, queries: int, keys: int) -> mx.array:
    """Return the mask as numbers [T, S] to add."""
    last_two = mask.reshape(mask.shape[-2:])
    if last_two.dtype == mx.bool_:
        last_two = mx.where(last_two, 0.0, -mx.inf)
    return mx.broadcast_to(last_two.astype(mx.float32), (queries, keys))


_ATTENTION = Operation("attention", _reference, native=(_why_not_native, _native))
