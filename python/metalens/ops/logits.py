"""From normed rows to logits, z = f(s * (U n + u0)), and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx

from metalens.ops.backends import native
from metalens.ops.head import Head
from metalens.ops.matmul import linear
from metalens.ops.weight import kernels_support


def native_head(head: Head) -> tuple[ModuleType, Any] | None:
    """The extension and the same head as its kernels take it; None where plain MLX must do, because of the backend or the weight's format.

    Raises:
        ValueError: if the head's parts do not fit together.
    """
    w, extension = head.weight, native()
    if extension is None or not kernels_support(w):
        return None
    made = extension.Head(w.values, w.scales, w.biases, w.group_size, w.bits, w.mode, head.bias, head.scale, head.softcap, head.used_rows)
    return extension, made


def head_logits(n: mx.array, head: Head) -> mx.array:
    """Logits of normed rows, in float32.

    The rows are widened first: logits rounded to 16 bits are off by more than the KL divergences that late layers have.

    Args:
        n: [..., D], after the final norm.
        head: the unembedding.

    Returns:
        [..., V] float32.
    """
    z = linear(n.astype(mx.float32), head.weight).astype(mx.float32)
    if head.bias is not None:
        z = z + head.bias.astype(mx.float32)
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * mx.tanh(z / head.softcap)
    return z if head.used_rows is None else mx.where(mx.arange(head.vocab_size) < head.used_rows, z, -mx.inf)


def head_vjp(dz: mx.array, z: mx.array, head: Head) -> mx.array:
    """The gradient at the normed rows from that at the logits: [..., V] -> [..., D], float32. `z` are the logits of `head_logits`."""
    if head.softcap is not None:
        dz = dz * mx.where(mx.isinf(z), 0.0, 1 - mx.square(z / head.softcap))  # the logits of padding are -inf
    if head.scale != 1.0:
        dz = dz * head.scale
    return linear(dz, head.weight, transpose=False).astype(mx.float32)
