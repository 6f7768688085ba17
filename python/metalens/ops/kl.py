"""lens_kl: KL(model || lens) of every row and its gradient, without holding all logits.

The rows of all layers go through the head together, so that U is read once for all of them. The loss of one layer never
meets the graph of another: memory does not grow with the number of layers. The forward pass forms the gradient ("gradient in
forward"), and the backward pass is one multiplication. dKL/dz = q - p is subtracted before it is multiplied with U, because
two means that nearly cancel must not be rounded separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from metalens.ops.backends import backend, extension, extension_precision, rounds_operands
from metalens.ops.chunks import in_chunks
from metalens.ops.dispatch import Operation
from metalens.ops.head import Head
from metalens.ops.logits import capped_logits, head_logits, head_vjp, native_head, with_offset
from metalens.ops.metal import kl as on_metal
from metalens.ops.metal import matrix_units
from metalens.ops.metal.matrix_units import MATRIX_UNITS_ARE_FASTER
from metalens.ops.metal.speed import PLAIN_IS_FASTER, Asked, Matrix, plain_stats_are_faster
from metalens.ops.softmax import entropy, kl_divergence, log_softmax_and_lse
from metalens.ops.weight import unreadable
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class LensTarget:
    """The model's own prediction for N tokens, computed once and compared with every layer. Float32, nats; lazy.

    Attributes:
        n: [N, D] the model's rows after the final norm.
        lse: [N] log-sum-exp of the model's logits.
        entropy: [N] entropy of the model's prediction.
        mean: [N, D] mean row of U under the prediction; None if `lens_kl` does not use it (a softcapped head, the reference, Metal).
    """

    n: mx.array
    lse: mx.array
    entropy: mx.array
    mean: mx.array | None = None


def lens_target(n_model: mx.array, head: Head) -> LensTarget:
    """Compute the target of `lens_kl`. Not differentiable: the model is frozen.

    Args:
        n_model: [N, D] the model's own rows after the final norm.
        head: the unembedding.

    Raises:
        InvalidValueError: if the shapes do not fit together.
    """
    d = head.weight.shape[1]
    if n_model.ndim != 2 or n_model.shape[1] != d:
        raise InvalidValueError(f"lens_target needs n_model [N, {d}], got {n_model.shape}.")
    n_model = mx.stop_gradient(n_model).astype(mx.float32)
    return LensTarget(n_model, *_LENS_TARGET(n_model, head))


def lens_kl(n: mx.array, target: LensTarget, head: Head) -> tuple[mx.array, mx.array]:
    """Compute KL(p || q) in nats for every row, and its gradient at n. Lazy; the KL is differentiable in n.

    p is the model's prediction from its own last hidden state, q the lens's prediction for the same token.

    Args:
        n: [L, N, D] lens rows after the final norm: L layers of N tokens.
        target: the model's prediction for the same N tokens, with the same head.
        head: the unembedding.

    Returns:
        kl [L, N] float32, and dkl/dn [L, N, D] float32 for callers that apply it themselves. A row with NaN is NaN in both;
        other rows are not affected.

    Raises:
        InvalidValueError: if the shapes do not fit together.
    """
    d = head.weight.shape[1]
    if n.ndim != 3 or n.shape[-1] != d or n.shape[1:] != target.n.shape:
        raise InvalidValueError(f"lens_kl needs n [L, N, {d}] and a target of n_model [N, {d}]; got {n.shape} and {target.n.shape}.")
    if n.size == 0:
        return mx.zeros(n.shape[:2]), mx.zeros(n.shape)
    kl, gradient = _LENS_KL(n, target, head)
    return kl, mx.stop_gradient(gradient)


# ---------------------------------------------------------------------- lens_target: (lse, entropy, mean or None)

Target = tuple[mx.array, mx.array, mx.array | None]


def _target_reference(n_model: mx.array, head: Head) -> Target:
    def chunk(n: mx.array) -> Sequence[mx.array]:
        log_p, p, lse = log_softmax_and_lse(head_logits(n, head))
        return lse, entropy(p, log_p)

    lse, of_model = in_chunks(chunk, n_model[None], [], head.vocab_size)
    return lse[0], of_model[0], None


def _target_native(n_model: mx.array, head: Head) -> Target:
    lse, of_model, *mean = extension().lens_target(n_model, native_head(head), True, extension_precision())
    return lse, of_model, mean[0] if mean else None


def _target_metal(n_model: mx.array, head: Head) -> Target:
    return *on_metal.lens_target(n_model, head, rounds_operands()), None


def _target_why_not_native(n_model: mx.array, head: Head) -> str:
    return unreadable(head.weight)


def _target_why_not_metal(n_model: mx.array, head: Head) -> str:
    if not n_model.size:
        return "there are no rows"
    if matrix_units.fit(n_model.shape[0], rounds_operands()):
        return MATRIX_UNITS_ARE_FASTER
    if reason := unreadable(head.weight):
        return reason
    asked = Asked(1, n_model.shape[0], with_model=False)
    return PLAIN_IS_FASTER if backend() == "auto" and plain_stats_are_faster(asked, Matrix.of(head.weight)) else ""


_LENS_TARGET = Operation(
    "lens_target", _target_reference, native=(_target_why_not_native, _target_native), metal=(_target_why_not_metal, _target_metal)
)


# ---------------------------------------------------------------------- lens_kl: (kl, gradient)


def _kl_reference(n: mx.array, target: LensTarget, head: Head) -> Sequence[mx.array]:
    def chunk(n: mx.array, n_model: mx.array) -> Sequence[mx.array]:
        z = capped_logits(n, head)
        log_q, q, _ = log_softmax_and_lse(with_offset(z, head))
        log_p, p, _ = log_softmax_and_lse(head_logits(n_model, head))
        return kl_divergence(p, log_p, log_q), head_vjp(q - p, z, head)

    return _differentiable(n.astype(mx.float32), lambda n: in_chunks(chunk, n, [target.n], head.vocab_size))


def _kl_native(n: mx.array, target: LensTarget, head: Head) -> Sequence[mx.array]:
    mean = target.mean
    if mean is None and head.softcap is None:  # another backend made the target
        mean = _target_native(target.n, head)[2]
    found: Sequence[mx.array] = extension().lens_kl(n, native_head(head), target.n, target.lse, mean, True, extension_precision())
    return found


def _kl_metal(n: mx.array, target: LensTarget, head: Head) -> Sequence[mx.array]:
    return _differentiable(n.astype(mx.float32), lambda n: on_metal.lens_kl(n, target.n, target.lse, head, rounds_operands()))


def _kl_why_not(n: mx.array, target: LensTarget, head: Head) -> str:
    return unreadable(head.weight)


def _differentiable(n: mx.array, function: Callable[[mx.array], Sequence[mx.array]]) -> Sequence[mx.array]:
    """Return function(n) = (kl, dkl/dn) with a kl that is differentiable in n, by that gradient."""

    @mx.custom_function
    def with_gradient(n: mx.array) -> Sequence[mx.array]:
        return function(n)

    @with_gradient.vjp
    def _(_: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return cotangents[0][..., None] * outputs[1]

    return cast("Sequence[mx.array]", with_gradient(n))


_LENS_KL = Operation("lens_kl", _kl_reference, native=(_kl_why_not, _kl_native), metal=(_kl_why_not, _kl_metal))
