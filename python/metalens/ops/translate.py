"""translate_norm: a translator and the model's final norm in one operation, n = norm(W h + b)."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.backends import extension, extension_precision
from metalens.ops.dispatch import Operation
from metalens.ops.matmul import linear
from metalens.ops.metal import translate as on_metal
from metalens.ops.norm import Norm
from metalens.ops.weight import FLOATS, Weight


def translate_norm(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> mx.array:
    """Compute norm(W h + b) for every row. Lazy; differentiable in h, W and b. The norm's own parameters are frozen.

    Args:
        h: [..., D] hidden states of any float type; widened to float32.
        weight: W [D, D]; None = the identity.
        bias: b [D].
        norm: the final norm. A norm of unknown kind runs in plain MLX, by its own function.

    Returns:
        [..., D] float32, unless the norm's function returns another type.
    """
    return _TRANSLATE_NORM(h.astype(mx.float32), weight, bias, norm)


def normed(h: mx.array, norm: Norm) -> mx.array:
    """Compute norm(h) for every row, in float32: the same bits as `translate_norm` with W = I and b = 0.

    The last layer's translator is optimal at the identity. If the model's own row were rounded differently, the gradient there
    would not be exactly zero, and steps that are too long for this sharp minimum would leave it.

    Args:
        h: [..., D] hidden states of any float type.
        norm: the final norm.
    """
    return _NORMED(h.astype(mx.float32), norm)


def _frozen(norm: Norm) -> tuple[mx.array | None, mx.array | None]:
    gain, bias = (None if p is None else mx.stop_gradient(p) for p in (norm.weight, norm.bias))
    return gain, bias


# ---------------------------------------------------------------------- normed


def _norm_reference(h: mx.array, norm: Norm) -> mx.array:
    gain, bias = _frozen(norm)
    if norm.kind == "rms":
        return mx.fast.rms_norm(h, gain, norm.eps)
    if norm.kind == "layer":
        return mx.fast.layer_norm(h, gain, bias, norm.eps)
    return norm(h)


def _norm_native(h: mx.array, norm: Norm) -> mx.array:
    n: mx.array = extension().translate_norm(h, None, None, norm.kind, *_frozen(norm), norm.eps, extension_precision())
    return n


def _norm_why_not_native(h: mx.array, norm: Norm) -> str:
    return "" if norm.kind is not None else "the kernels do not know this norm"


_NORMED = Operation("normed", _norm_reference, native=(_norm_why_not_native, _norm_native))


# ---------------------------------------------------------------------- translate_norm


def _reference(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> mx.array:
    return _norm_reference((h if weight is None else linear(h, Weight(weight))) + bias, norm)


def _native(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> mx.array:
    n: mx.array = extension().translate_norm(h, weight, bias, norm.kind, *_frozen(norm), norm.eps, extension_precision())
    return n


def _metal(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> mx.array:
    assert weight is not None
    return on_metal.translate_norm(h, weight, bias, norm, lambda y: _norm_reference(y, norm))


def _why_not_native(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> str:
    if norm.kind is None:
        return "the kernels do not know this norm"
    known = bias.dtype in FLOATS and (weight is None or weight.dtype in FLOATS)
    return "" if known else "the kernels read float32, float16 and bfloat16 translators"


def _why_not_metal(h: mx.array, weight: mx.array | None, bias: mx.array, norm: Norm) -> str:
    if weight is None:
        return "without a matrix there is no product to join with the norm"
    return _why_not_native(h, weight, bias, norm) if h.size else "there are no rows"


_TRANSLATE_NORM = Operation("translate_norm", _reference, native=(_why_not_native, _native), metal=(_why_not_metal, _metal))
