"""lens_kl: KL(model || lens) of rows and its gradient, without ever holding all logits.

Rows of all layers go through the head together, so that U is read once for all of them, and the loss of one layer never meets the graph of another:
memory does not grow with the number of layers. The gradient is formed in the forward pass ("gradient in forward"), and the way back is one
multiplication: dKL/dz = q - p, subtracted before it is multiplied with U, because two means that nearly cancel must not be rounded apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from metalens.ops.backends import metal, precision
from metalens.ops.chunks import in_chunks
from metalens.ops.head import Head
from metalens.ops.logits import head_logits, head_vjp, native_head
from metalens.ops.metal import kl as on_metal
from metalens.ops.softmax import entropy, kl_divergence, log_softmax_and_lse
from metalens.ops.weight import kernels_support
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class LensTarget:
    """What the model itself predicts for N tokens: all that a lens is compared with, computed once for all layers. Float32, nats; lazy.

    Attributes:
        n: [N, D] the model's rows after the final norm.
        lse: [N] log-sum-exp of its logits.
        entropy: [N] of its prediction.
        mean: [N, D] the mean row of U under its prediction; None where `lens_kl` has no use for it (a softcapped head, the reference).
    """

    n: mx.array
    lse: mx.array
    entropy: mx.array
    mean: mx.array | None = None


def lens_target(n_model: mx.array, head: Head) -> LensTarget:
    """The target of `lens_kl`. Not differentiable: the model is frozen.

    Args:
        n_model: [N, D] the model's own rows after the final norm.
        head: the unembedding.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    d = head.weight.shape[1]
    if n_model.ndim != 2 or n_model.shape[1] != d:
        raise InvalidValueError(f"lens_target needs n_model [N, {d}], got {n_model.shape}.")
    n_model = mx.stop_gradient(n_model).astype(mx.float32)
    if n_model.size and kernels_support(head.weight) and metal():
        return LensTarget(n_model, *on_metal.lens_target(n_model, head, precision() == "bf16"))
    if (found := native_head(head)) is not None:
        extension, kernel_head = found
        lse, of_model, *mean = extension.lens_target(n_model, kernel_head, True, precision())
        return LensTarget(n_model, lse, of_model, mean[0] if mean else None)

    def chunk(n: mx.array) -> Sequence[mx.array]:
        log_p, p, lse = log_softmax_and_lse(head_logits(n, head))
        return lse, entropy(p, log_p)

    lse, of_model = in_chunks(chunk, n_model[None], [], head.vocab_size)
    return LensTarget(n_model, lse[0], of_model[0])


def lens_kl(n: mx.array, target: LensTarget, head: Head) -> tuple[mx.array, mx.array]:
    """KL(p || q) in nats of every row, and its gradient with respect to n. Lazy; the KL is differentiable in n.

    p is what the model predicts from its own last state, q what a lens predicts for the same token.

    Args:
        n: [L, N, D] lens rows after the final norm: L layers of N tokens.
        target: of the same N tokens and the same head.
        head: the unembedding.

    Returns:
        kl [L, N] float32, and dkl/dn [L, N, D] float32, for callers who go on by hand. A row with NaN is NaN in both, and no other row is.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    d = head.weight.shape[1]
    if n.ndim != 3 or n.shape[-1] != d or n.shape[1:] != target.n.shape:
        raise InvalidValueError(f"lens_kl needs n [L, N, {d}] and a target of n_model [N, {d}]; got {n.shape} and {target.n.shape}.")
    if n.size == 0:
        return mx.zeros(n.shape[:2]), mx.zeros(n.shape)
    if kernels_support(head.weight) and metal():
        kl, dn = _with_gradient(n.astype(mx.float32), lambda n: on_metal.lens_kl(n, target.n, target.lse, head, precision() == "bf16"))
    elif (found := native_head(head)) is not None:
        extension, kernel_head = found
        mean = target.mean
        if mean is None and head.softcap is None:  # a target that the reference made
            mean = lens_target(target.n, head).mean
        kl, dn = extension.lens_kl(n, kernel_head, target.n, target.lse, mean, True, precision())
    else:
        kl, dn = _reference(n.astype(mx.float32), target, head)
    return kl, mx.stop_gradient(dn)


def _reference(n: mx.array, target: LensTarget, head: Head) -> Sequence[mx.array]:
    def chunk(n: mx.array, n_model: mx.array) -> Sequence[mx.array]:
        z = head_logits(n, head)
        log_q, q, _ = log_softmax_and_lse(z)
        log_p, p, _ = log_softmax_and_lse(head_logits(n_model, head))
        return kl_divergence(p, log_p, log_q), head_vjp(q - p, z, head)

    return _with_gradient(n, lambda n: in_chunks(chunk, n, [target.n], head.vocab_size))


def _with_gradient(n: mx.array, function: Callable[[mx.array], Sequence[mx.array]]) -> Sequence[mx.array]:
    """function(n) = (kl, dkl/dn), as something whose first result is differentiable in n by the second."""

    @mx.custom_function
    def with_gradient(n: mx.array) -> Sequence[mx.array]:
        return function(n)

    @with_gradient.vjp
    def _(_: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return cotangents[0][..., None] * outputs[1]

    return cast("Sequence[mx.array]", with_gradient(n))
