"""swiglu: what stands between the two products of most models' feed-forward layers. MLX's exponential is slow on Linux CPUs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metalens.ops.autograd import with_gradient_of
from metalens.ops.backends import native
from metalens.ops.weight import FLOATS


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, elementwise. Lazy; its gradient is plain MLX's.

    Args:
        gate, x: of one shape and type.

    Returns:
        the same shape and type; the native kernels compute in float32.
    """
    extension = native()
    if extension is None or gate.dtype != x.dtype or x.dtype not in FLOATS or gate.shape != x.shape:
        return _plain(gate, x)

    return with_gradient_of(_plain, extension.swiglu)(gate, x)


def _plain(gate: mx.array, x: mx.array) -> mx.array:
    y: mx.array = nn.silu(gate) * x
    return y
