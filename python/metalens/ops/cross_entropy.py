"""lens_ce: cross-entropy of labels for every row of a lens, and its gradient, without holding all logits.

The native kernel of `lens_target` gives the log-sum-exp of a row and the mean row of U under its softmax, in one pass over U. For a linear head
that is all: with the label's row u and logit z, ce = lse - z, and its gradient is scale * (mean - u).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from metalens.ops.backends import extension, extension_precision
from metalens.ops.chunks import in_chunks
from metalens.ops.dispatch import Operation
from metalens.ops.head import Head
from metalens.ops.logits import capped_logits, head_vjp, native_head, with_offset
from metalens.ops.softmax import log_softmax_and_lse
from metalens.ops.weight import unpacked_rows, unreadable
from metalens.utils.errors import InvalidValueError


def lens_ce(n: mx.array, labels: mx.array, head: Head) -> tuple[mx.array, mx.array]:
    """Compute -log q(label) in nats for every row, and its gradient at n. Lazy.

    Args:
        n: [L, N, D] lens rows after the final norm: L layers of N tokens.
        labels: [N] token ids, the same for every layer. A label that is not a token of the head gives NaN in both results.
        head: the unembedding.

    Returns:
        ce [L, N] float32, and dce/dn [L, N, D] float32. A row with NaN is NaN in both; other rows are not affected.

    Raises:
        InvalidValueError: if the shapes do not fit together.
    """
    d = head.weight.shape[1]
    if n.ndim != 3 or n.shape[-1] != d or labels.shape != n.shape[1:2]:
        raise InvalidValueError(f"lens_ce needs n [L, N, {d}] and labels [N]; got {n.shape} and {labels.shape}.")
    if n.size == 0:
        return mx.zeros(n.shape[:2]), mx.zeros(n.shape)
    valid = (labels >= 0) & (labels < head.tokens)
    ce, gradient = _LENS_CE(n, mx.where(valid, labels, 0), head)  # MLX would read other memory for an id outside the head
    return mx.where(valid, ce, mx.nan), mx.stop_gradient(mx.where(valid[:, None], gradient, mx.nan))


def _reference(n: mx.array, labels: mx.array, head: Head) -> Sequence[mx.array]:
    def chunk(n: mx.array, labels: mx.array) -> Sequence[mx.array]:
        z = capped_logits(n, head)
        log_q, q, _ = log_softmax_and_lse(with_offset(z, head))
        at = mx.broadcast_to(labels[None, :, None], (*n.shape[:2], 1))
        hit = mx.arange(head.vocab_size) == at
        return -mx.take_along_axis(log_q, at, axis=-1)[..., 0], head_vjp(q - hit, z, head)

    return in_chunks(chunk, n.astype(mx.float32), [labels], head.vocab_size)


def _native(n: mx.array, labels: mx.array, head: Head) -> Sequence[mx.array]:
    n = n.astype(mx.float32)
    lse, _, mean = extension().lens_target(n.reshape(-1, n.shape[-1]), native_head(head), True, extension_precision())
    u = unpacked_rows(head.weight, labels)
    z = mx.sum(n * u, axis=-1)
    if head.bias is not None:
        z = z + mx.take(head.bias, labels).astype(mx.float32)
    z = z * head.scale
    if head.offset is not None:
        z = z + mx.take(head.offset, labels).astype(mx.float32)
    return lse.reshape(n.shape[:2]) - z, head.scale * (mean.reshape(n.shape) - u)


def _why_not_native(n: mx.array, labels: mx.array, head: Head) -> str:
    return unreadable(head.weight) or ("" if head.softcap is None else "the head has a softcap, and the kernel's mean row is of linear heads")


_LENS_CE = Operation("lens_ce", _reference, native=(_why_not_native, _native))
