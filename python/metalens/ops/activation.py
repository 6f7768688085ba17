"""swiglu, gelu_approx: the activations between the products of feed-forward layers. MLX's own are slow on Linux CPUs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metalens.ops.backends import extension
from metalens.ops.dispatch import Operation
from metalens.ops.weight import FLOATS


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate) * x, elementwise. Lazy; the gradient is plain MLX's.

    Args:
        gate, x: arrays of one shape and type.

    Returns:
        An array of the same shape and type. The native kernels compute in float32.
    """
    return _SWIGLU(gate, x)


def gelu_approx(x: mx.array) -> mx.array:
    """Return `mlx.nn.gelu_approx(x)`: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2. Lazy; the gradient is plain MLX's.

    Args:
        x: an array of any shape.

    Returns:
        An array of the same shape and type. The native kernels compute in float32.
    """
    return _GELU_APPROX(x)


def _swiglu_reference(gate: mx.array, x: mx.array) -> mx.array:
    y: mx.array = nn.silu(gate) * x
    return y


def _swiglu_native(gate: mx.array, x: mx.array) -> mx.array:
    y: mx.array = extension().swiglu(gate, x)
    return y


def _swiglu_why_not_native(gate: mx.array, x: mx.array) -> str:
    if gate.shape != x.shape:
        return "gate and x have different shapes"
    return "" if gate.dtype == x.dtype and x.dtype in FLOATS else "gate and x are not of one float type"


def _gelu_reference(x: mx.array) -> mx.array:
    y: mx.array = nn.gelu_approx(x)
    return y


def _gelu_native(x: mx.array) -> mx.array:
    y: mx.array = extension().gelu_tanh(x)
    return y


def _gelu_why_not_native(x: mx.array) -> str:
    return "" if x.dtype in FLOATS else f"the kernels read no x of {x.dtype}"


_SWIGLU = Operation("swiglu", _swiglu_reference, native=(_swiglu_why_not_native, _swiglu_native))
_GELU_APPROX = Operation("gelu_approx", _gelu_reference, native=(_gelu_why_not_native, _gelu_native))
