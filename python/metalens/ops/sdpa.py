"""attention: scaled dot-product attention for the forward pass of a frozen model; on a CPU without a [T, S] matrix."""

from __future__ import annotations

import mlx.core as mx

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
        sinks: [H] logits of one more key whose value is zero, or None.

    Returns:
        [B, H, T, E] in the type of q. The native kernels compute in float32.
    """
    return _ATTENTION(q, k, v, scale, mask, sinks)


def _reference(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array | None, sinks: mx.array | None) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def _native(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array | None, sinks: mx.array | None) -> mx.array:
    causal = isinstance(mask, str)
    y: mx.array = extension().attention(q, k, v, scale, causal, None if causal else mask, sinks, extension_precision())
    return y


def _why_not_native(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array | None, sinks: mx.array | None) -> str:
    if not {q.dtype, k.dtype, v.dtype} <= set(FLOATS):
        return f"the kernels read no q, k, v of {q.dtype}, {k.dtype}, {v.dtype}"
    if sinks is not None and sinks.dtype not in FLOATS:
        return f"the kernels read no sinks of {sinks.dtype}"
    if isinstance(mask, mx.array):
        return "" if mask.dtype == mx.bool_ or mask.dtype in FLOATS else f"the kernels read no mask of {mask.dtype}"
    return "" if mask in (None, "causal") else f"the kernels have no mask {mask!r}"


_ATTENTION = Operation("attention", _reference, native=(_why_not_native, _native))
