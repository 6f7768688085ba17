"""head_logits(n, head): from normed rows to logits, z = f(s * (U n + u0))."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.linear import Weight, linear


@dataclass(frozen=True)
class Head:
    """The unembedding of a model, frozen.

    Attributes:
        weight: U [V, D].
        bias: u0 [V], or None.
        scale: s, multiplies the logits before the softcap.
        softcap: c of f(t) = c * tanh(t / c), or None for a linear head.
    """

    weight: Weight
    bias: mx.array | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V: rows of U, whatever the tokenizer says."""
        return self.weight.shape[0]


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
    return z


def head_pullback(dz: mx.array, z: mx.array, head: Head) -> mx.array:
    """The gradient at the normed rows from that at the logits: [..., V] -> [..., D], float32. `z` are the logits of `head_logits`."""
    if head.softcap is not None:
        dz = dz * (1 - mx.square(z / head.softcap))
    if head.scale != 1.0:
        dz = dz * head.scale
    return linear(dz, head.weight, transpose=False).astype(mx.float32)
