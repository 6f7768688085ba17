"""lens_compare: KL divergences, Jensen-Shannon divergence and total variation of two sets of rows, without holding their logits.

A total variation is a sum of |p - q|, which is unknown until both normalizers are known. So the native kernels read U twice: once
for the log-sum-exp of the rows of both sides together, once for the sums. Two heads are read twice each. On a GPU a chunk of logits
is read twice instead, as in `lens_kl`. Every term of these sums is positive, and vanishes where p = q: small divergences have small
errors. The reference subtracts log-probabilities, with the error of float32 in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.backends import extension, extension_precision, rounds_operands
from metalens.ops.chunks import in_chunks
from metalens.ops.dispatch import Operation
from metalens.ops.head import Head
from metalens.ops.logits import head_logits, native_head
from metalens.ops.metal import compare as on_metal
from metalens.ops.softmax import kl_divergence, log_softmax_and_lse, row_sum
from metalens.ops.weight import unreadable
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class LensComparison:
    """The differences of L x N pairs of predictions p and q; float32.

    Attributes:
        kl: [L, N] KL(p || q) in nats.
        reverse_kl: [L, N] KL(q || p) in nats.
        js: [L, N] Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2 in nats, with m = (p + q) / 2: 0 to log 2.
        tv: [L, N] total variation sum |p - q| / 2: 0 to 1.
    """

    kl: mx.array
    reverse_kl: mx.array
    js: mx.array
    tv: mx.array


def lens_compare(a: mx.array, b: mx.array, head: Head, head_b: Head | None = None) -> LensComparison:
    """Compare the predictions of two sets of rows. Lazy; not differentiable.

    Args:
        a: [L, N, D] rows after the final norm, whose predictions are p.
        b: [L, N, D'] rows whose predictions are q; or [1, N, D'], which are compared with every layer of a.
        head: the unembedding of a.
        head_b: the unembedding of b, with the same tokens. None = `head`.

    Returns:
        arrays [L, N]. A pair with NaN in one of its rows is NaN in all of them.

    Raises:
        InvalidValueError: if the shapes do not fit together, or the heads have different numbers of tokens.
    """
    other = head if head_b is None else head_b
    width, width_b = head.weight.shape[1], other.weight.shape[1]
    if a.ndim != 3 or a.shape[-1] != width or a.shape[1] == 0:
        raise InvalidValueError(f"lens_compare needs a [L, N, {width}] with N >= 1, got {a.shape}.")
    if b.ndim != 3 or b.shape[1:] != (a.shape[1], width_b) or b.shape[0] not in (1, a.shape[0]):
        raise InvalidValueError(f"lens_compare needs b [{a.shape[0]} or 1, {a.shape[1]}, {width_b}] for a {a.shape}, got {b.shape}.")
    if other.tokens != head.tokens:
        raise InvalidValueError(
            f"Predictions are compared token by token: the heads must have one vocabulary, not {head.tokens} and {other.tokens} tokens."
        )
    if a.shape[0] == 0:
        return LensComparison(*(mx.zeros(a.shape[:2]) for _ in range(4)))
    return LensComparison(*_LENS_COMPARE(a, b, head, head_b))


def logits_comparison(z_a: mx.array, z_b: mx.array) -> LensComparison:
    """Compare given logits [..., V], in plain MLX. Lazy."""
    log_p, p, _ = log_softmax_and_lse(z_a)
    log_q, q, _ = log_softmax_and_lse(z_b)
    log_m = mx.logaddexp(log_p, log_q) - mx.log(mx.array(2.0))
    js = (kl_divergence(p, log_p, log_m) + kl_divergence(q, log_q, log_m)) / 2
    return LensComparison(kl_divergence(p, log_p, log_q), kl_divergence(q, log_q, log_p), js, row_sum(mx.abs(p - q)) / 2)


def _reference(a: mx.array, b: mx.array, head: Head, head_b: Head | None) -> list[mx.array]:
    other = head if head_b is None else head_b

    def chunk(a: mx.array, b: mx.array) -> list[mx.array]:
        z_a, z_b = (head_logits(rows, h)[..., : head.tokens] for rows, h in ((a, head), (b.swapaxes(0, 1), other)))
        found = logits_comparison(z_a, z_b)
        return [mx.broadcast_to(value, a.shape[:2]) for value in vars(found).values()]

    return in_chunks(chunk, a, [b.swapaxes(0, 1)], 2 * head.vocab_size)


def _native(a: mx.array, b: mx.array, head: Head, head_b: Head | None) -> list[mx.array]:
    precision = extension_precision()
    of_a, of_b = native_head(head), None if head_b is None else native_head(head_b)

    def lse(rows: mx.array, of_rows: object) -> mx.array:
        found: mx.array = extension().lens_target(rows.reshape(-1, rows.shape[-1]), of_rows, False, precision)[0]
        return found.reshape(rows.shape[:2])

    if of_b is None:  # one reading of the head for both
        both = lse(mx.concatenate([a, b]), of_a)
        lse_a, lse_b = both[: a.shape[0]], both[a.shape[0] :]
    else:
        lse_a, lse_b = lse(a, of_a), lse(b, of_b)
    found: list[mx.array] = extension().lens_compare(a, of_a, lse_a, b, lse_b, of_b, precision)
    return found


def _why_not(a: mx.array, b: mx.array, head: Head, head_b: Head | None) -> str:
    return unreadable(head.weight) or ("" if head_b is None else unreadable(head_b.weight))


def _metal(a: mx.array, b: mx.array, head: Head, head_b: Head | None) -> list[mx.array]:
    return on_metal.lens_compare(a, b, head, head if head_b is None else head_b, rounds_operands())


_LENS_COMPARE = Operation("lens_compare", _reference, native=(_why_not, _native), metal=(_why_not, _metal))
