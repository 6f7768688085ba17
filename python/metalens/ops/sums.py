"""Run the residual sums of a model, and other sums and products that it writes with + and *, on the native kernels."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from metalens.ops.backends import native


def run_sums_natively(outputs: Iterable[mx.array]) -> None:
    """Let the sums and products that lazy arrays wait for run on the native kernels, if the next operation would use them.

    MLX adds 16-bit numbers on Linux CPUs at a small part of the memory's speed, and on one thread. A model writes its residual sums as
    `x + r`, which no other function can stand in for, so the graph is changed after the model has built it: each sum or product of two
    float arrays of one type gets another evaluation. Values stay the same to the last bit, and nothing is evaluated.

    Args:
        outputs: arrays that are not evaluated yet. Evaluated arrays, and arrays inside a transformation of MLX, stay as they are.
    """
    if (extension := native()) is not None:
        extension.run_sums_natively(list(outputs))
