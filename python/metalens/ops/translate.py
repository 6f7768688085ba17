"""translate_norm: a translator and the model's final norm in one, n = norm(W h + b)."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.backends import metal, native, precision
from metalens.ops.matmul import linear
from metalens.ops.metal import translate as on_metal
from metalens.ops.norm import Norm
from metalens.ops.weight import FLOATS, Weight


def translate_norm(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> mx.array:
    """Norm(W h + b) of every row. Lazy; differentiable in h, W and b, the norm's own parameters are frozen.

    Args:
        h: [..., D], any float type; widened to float32.
        weight: W [D, D]; None = the identity.
        bias: b [D].
        norm: the norm; one of unknown kind is run as it is.

    Returns:
        [..., D], float32 unless the norm's function says otherwise.
    """
    h = h.astype(mx.float32)
    readable = norm.kind is not None and {bias.dtype, mx.float32 if weight is None else weight.dtype} <= set(FLOATS)
    if readable and weight is not None and h.size and metal():
        return on_metal.translate_norm(h, weight, bias, norm, lambda y: _plain(y, norm))
    extension = native()
    if extension is not None and readable:
        n: mx.array = extension.translate_norm(h, weight, bias, norm.kind, *_frozen(norm), norm.eps, precision())
        return n
    return _plain((h if weight is None else linear(h, Weight(weight))) + bias, norm)


def normed(h: mx.array, norm: Norm) -> mx.array:
    """The rows norm(h) in float32, to the last bit what `translate_norm` gives for W = I and b = 0.

    A lens's last translator is perfect as the identity. Were the model's own row rounded otherwise, its gradient would not be exactly zero, and steps
    that are too long for so sharp a minimum would carry it away.
    """
    h = h.astype(mx.float32)
    extension = native()
    if extension is not None and norm.kind is not None:
        n: mx.array = extension.translate_norm(h, None, None, norm.kind, *_frozen(norm), norm.eps, precision())
        return n
    return _plain(h, norm)


def _frozen(norm: Norm) -> tuple[mx.array | None, mx.array | None]:
    gain, bias = (None if p is None else mx.stop_gradient(p) for p in (norm.weight, norm.bias))
    return gain, bias


def _plain(y: mx.array, norm: Norm) -> mx.array:
    gain, bias = _frozen(norm)
    if norm.kind == "rms":
        return mx.fast.rms_norm(y, gain, norm.eps)
    if norm.kind == "layer":
        return mx.fast.layer_norm(y, gain, bias, norm.eps)
    return norm(y)
