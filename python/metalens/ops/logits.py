"""Compute logits z = f(s * (U n + u0)) + o from normed rows, and gradients at the rows from gradients at the logits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalens.ops.backends import extension
from metalens.ops.head import Head
from metalens.ops.matmul import linear


def native_head(head: Head) -> Any:
    """Return the extension's form of a head that its kernels read.

    Raises:
        ValueError: if the parts of the head do not fit together.
    """
    w = head.weight
    form = w.group_size, w.bits, w.mode
    return extension().Head(w.values, w.scales, w.biases, *form, head.bias, head.scale, head.softcap, head.used_rows, head.offset)


def head_logits(n: mx.array, head: Head) -> mx.array:
    """Return the logits of normed rows, in float32. Lazy.

    The rows are widened first: rounding logits to 16 bits changes them by more than the KL divergences of late layers.

    Args:
        n: [..., D] rows after the final norm.
        head: the unembedding.

    Returns:
        [..., V] float32.
    """
    return with_offset(capped_logits(n, head), head)


def capped_logits(n: mx.array, head: Head) -> mx.array:
    """Return f(s * (U n + u0)) [..., V] in float32 for every row of U: the logits before the offset. Lazy."""
    z = linear(n.astype(mx.float32), head.weight).astype(mx.float32)
    if head.bias is not None:
        z = z + head.bias.astype(mx.float32)
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * mx.tanh(z / head.softcap)
    return z


def with_offset(z: mx.array, head: Head) -> mx.array:
    """Return the logits [..., V] from those before the offset: z + o, and -inf for padding. Lazy."""
    if head.offset is not None:
        z = z + head.offset.astype(mx.float32)
    return z if head.used_rows is None else mx.where(mx.arange(head.vocab_size) < head.used_rows, z, -mx.inf)


def head_vjp(dz: mx.array, z: mx.array, head: Head) -> mx.array:
    """Return the gradient [..., D] float32 at the normed rows, given the gradient `dz` [..., V] at their logits. Lazy.

    Args:
        dz: [..., V] gradient at the logits, 0 for padding.
        z: [..., V] logits before the offset, as `capped_logits` returns them: the slope of the softcap does not see the offset.
        head: the unembedding.
    """
    if head.softcap is not None:
        dz = dz * (1 - mx.square(z / head.softcap))
    if head.scale != 1.0:
        dz = dz * head.scale
    return linear(dz, head.weight, transpose=False).astype(mx.float32)
