"""swiglu: the gated activation between the products of most models' feed-forward layers. MLX's exponential is slow on Linux CPUs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metalens.ops.autograd import with_gradient_of
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


def _reference(gate: mx.array, x: mx.array) -> mx.array:
    y: mx.array = nn.silu(gate) * x
    return y


def _native(gate: mx.array, x: mx.array) -> mx.array:
    return with_gradient_of(_reference, extension().swiglu)(gate, x)


def _why_not_native(gate: mx.array, x: mx.array) -> str:
    if gate.shape != x.shape:
        return "gate and x have different shapes"
    return "" if gate.dtype == x.dtype and x.dtype in FLOATS else "gate and x are not of one float type"


_SWIGLU = Operation("swiglu", _reference, native=(_why_not_native, _native))
