"""translate_norm on the GPU.

The translator's product adds the bias before it rounds. The norm after it is MLX's own kernel, which reads the product's result from the cache: 8
bytes against 2 D multiplications for each element, so summing the squares inside the product could save less than a percent. In the backward pass one
kernel computes the gradients of norm and bias together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from metalens.ops.metal import descriptors, matrix_units, tuning
from metalens.ops.metal.kernel import absent, launch
from metalens.ops.metal.matmul import linear
from metalens.ops.metal.source import pack
from metalens.ops.norm import Norm
from metalens.ops.weight import Weight

KINDS = {"none": 0, "rms": 1, "layer": 2}  # enum NormKind of metal/norm_grad.h


def translate_norm(h: mx.array, weight: mx.array, bias: mx.array, norm: Norm, plain: Callable[[mx.array], mx.array]) -> mx.array:
    """Return norm(W h + b), [..., D] float32, differentiable in h, W and b. Lazy.

    Args:
        h: [..., D] float32.
        weight: W [D, D].
        bias: b [D].
        norm: a norm of a known kind.
        plain: the norm alone, in plain MLX.
    """

    @mx.custom_function
    def both(h: mx.array, weight: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        y = linear(h, Weight(weight), bias, 1.0, rounded=False)
        return plain(y), y

    @both.vjp
    def _(
        primals: tuple[mx.array, mx.array, mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        h, weight, bias = primals
        dy, db = _norm_grad(outputs[1], cotangents[0], norm)
        return matrix_units.matmul(dy, weight.astype(mx.float32)), matrix_units.matmul(dy.T, h).astype(weight.dtype), db.astype(bias.dtype)

    n, _ = cast("Callable[..., tuple[mx.array, mx.array]]", both)(h.reshape(-1, h.shape[-1]), weight, bias)
    return n.reshape(*h.shape[:-1], weight.shape[0])


def _norm_grad(y: mx.array, dn: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """Return (dy [N, D], db [D])."""
    rows, depth = y.shape
    assert norm.kind is not None
    rows_per_group = tuning.rows_per_group(rows, tuning.device())
    problem = {
        "rows": rows,
        "depth": depth,
        "kind": KINDS[norm.kind],
        "with_gain": int(norm.weight is not None),
        "rows_per_group": rows_per_group,
        "eps": norm.eps,
    }
    gain = absent() if norm.weight is None else norm.weight.astype(mx.float32)
    blocks = -(-rows // rows_per_group)
    dy, db = launch(
        descriptors.norm_grad(),
        [y, gain, dn.astype(mx.float32), mx.array(pack("norm_grad.h", "NormGradProblem", problem))],
        (blocks, 1, 1),
        [(rows, depth), (blocks, depth)],
        [mx.float32, mx.float32],
    )
    return dy, mx.sum(db, axis=0)
