"""rms_norm, layer_norm: the norms inside a model. MLX runs them on CPUs as a chain of elementwise operations."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.backends import extension
from metalens.ops.dispatch import Operation
from metalens.ops.weight import FLOATS


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Return `mlx.core.fast.rms_norm` of the same arguments: weight * x / sqrt(mean(x^2) + eps). Lazy; the gradient is plain MLX's.

    Args:
        x: [..., D].
        weight: [D] or None.
        eps: added to the mean square.

    Returns:
        [..., D] in the promoted type. The native kernels compute in float32 and round once.
    """
    return _RMS_NORM(x, weight, eps)


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Return `mlx.core.fast.layer_norm` of the same arguments: weight * (x - mean) / sqrt(variance + eps) + bias. Lazy.

    Args:
        x: [..., D].
        weight, bias: [D] or None.
        eps: added to the variance.

    Returns:
        [..., D] in the promoted type. The native kernels compute in float32 and round once. The gradient is plain MLX's.
    """
    return _LAYER_NORM(x, weight, bias, eps)


def _rms_reference(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


def _rms_native(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    y: mx.array = extension().rms_norm(x, weight, eps)
    return y


def _rms_why_not_native(x: mx.array, weight: mx.array | None, eps: float) -> str:
    return _why_not(x, weight)


def _layer_reference(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    return mx.fast.layer_norm(x, weight, bias, eps)


def _layer_native(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    y: mx.array = extension().layer_norm(x, weight, bias, eps)
    return y


def _layer_why_not_native(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> str:
    return _why_not(x, weight, bias)


def _why_not(x: mx.array, *parameters: mx.array | None) -> str:
    """Return why the kernels can't run. Plain MLX then reports arguments that are wrong."""
    if not x.ndim or not x.shape[-1]:
        return "there are no elements along the last axis"
    given = [p for p in parameters if p is not None]
    if any(p.shape != x.shape[-1:] for p in given):
        return "the parameters are not of the width of x"
    types = {a.dtype for a in (x, *given)}
    return "" if types <= set(FLOATS) else f"the kernels read no {', '.join(sorted(map(str, types)))}"


_RMS_NORM = Operation("rms_norm", _rms_reference, native=(_rms_why_not_native, _rms_native))
_LAYER_NORM = Operation("layer_norm", _layer_reference, native=(_layer_why_not_native, _layer_native))
