"""lens_stats: top-k, entropy, KL from and to the model, NLL and rank of labels for every row of logits, without holding all logits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalens.ops.backends import backend, extension, extension_precision, rounds_operands
from metalens.ops.chunks import in_chunks
from metalens.ops.dispatch import Operation
from metalens.ops.head import Head
from metalens.ops.logits import head_logits, native_head
from metalens.ops.metal import matrix_units, tuning
from metalens.ops.metal import stats as on_metal
from metalens.ops.metal.matrix_units import MATRIX_UNITS_ARE_FASTER
from metalens.ops.metal.speed import PLAIN_IS_FASTER, Asked, Matrix, plain_stats_are_faster
from metalens.ops.softmax import entropy, kl_divergence, log_softmax_and_lse
from metalens.ops.weight import unreadable
from metalens.utils.errors import InvalidTypeError, InvalidValueError


@dataclass(frozen=True)
class LensStats:
    """Statistics of L x N rows of logits, in nats; float32 unless stated.

    Attributes:
        lse: [L, N] log-sum-exp of the logits.
        entropy: [L, N] entropy of the prediction.
        max_probability: [L, N] probability of the most likely token.
        top_ids: [L, N, top_k] int32 ids, ordered by falling logit; equal logits by rising id.
        top_logits: [L, N, top_k] logits of top_ids.
        kl: [L, N] KL(model || row), or None without n_model.
        agrees: [L, N] bool, whether row and model have the same most likely token; None without n_model.
        nll: [L, N] -log q(label), or [L, N, C] for C labels of each token; None without labels.
        rank: [L, N] or [L, N, C] int32 rank of the label, 1 = most likely; None without labels.
        reverse_kl: [L, N] KL(row || model), or None if it was not asked for.
    """

    lse: mx.array
    entropy: mx.array
    max_probability: mx.array
    top_ids: mx.array
    top_logits: mx.array
    kl: mx.array | None = None
    agrees: mx.array | None = None
    nll: mx.array | None = None
    rank: mx.array | None = None
    reverse_kl: mx.array | None = None


def lens_stats(
    n: mx.array,
    head: Head,
    top_k: int = 1,
    n_model: mx.array | None = None,
    labels: mx.array | None = None,
    *,
    reverse: bool = False,
    k: int | None = None,
) -> LensStats:
    """Compute the statistics of every row, without holding all logits. Lazy; not differentiable.

    Args:
        n: [L, N, D] rows after the final norm: L layers of N tokens, N >= 1.
        head: the unembedding.
        top_k: number of most likely tokens to return, 1 <= top_k <= head.tokens. If several tokens have the same logit as
            the last of them, any of these tokens may be returned.
        n_model: [N, D] the model's own rows; adds kl and agrees.
        labels: [N] token ids, or [N, C] for C of them at each token, C >= 1; adds nll and rank. A label that is not a token
            gives NaN and -1.
        reverse: also compute reverse_kl. Needs n_model.
        k: the former name of top_k. Deprecated.

    Raises:
        InvalidValueError: if top_k is out of range, or the shapes do not fit together.
    """
    if k is not None:
        if top_k != 1:
            raise InvalidTypeError("lens_stats got both top_k and k, its former name. Pass top_k only.")
        warnings.warn("lens_stats(k=) is now top_k=; the old name will be removed in the next release.", DeprecationWarning, stacklevel=2)
        top_k = k
    _check(n, head, top_k, n_model, labels, reverse)
    if n.shape[0] == 0:
        return _no_layers(n.shape[1], top_k, n_model is not None, labels, reverse)
    found = iter(_LENS_STATS(n, head, top_k, n_model, labels, reverse))
    stats: list[Any] = [next(found) for _ in range(5)]
    of_model = [next(found) if n_model is not None else None for _ in range(2)]
    of_labels = [next(found) if labels is not None else None for _ in range(2)]
    of_reverse = [next(found) if reverse else None]
    return LensStats(*[*stats, *of_model, *of_labels, *of_reverse])


def _check(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None, reverse: bool) -> None:
    d = head.weight.shape[1]
    check_top_k(top_k, head.tokens)
    if n.ndim != 3 or n.shape[-1] != d or n.shape[1] == 0:
        raise InvalidValueError(f"lens_stats needs n [L, N, {d}] with N >= 1, got {n.shape}.")
    if n_model is not None and n_model.shape != n.shape[1:]:
        raise InvalidValueError(f"n_model must be {n.shape[1:]} for n {n.shape}, got {n_model.shape}.")
    if reverse and n_model is None:
        raise InvalidValueError("The reverse KL compares with the model: lens_stats(reverse=True) needs n_model.")
    if labels is None:
        return
    fits = labels.ndim in (1, 2) and labels.shape[:1] == n.shape[1:2] and labels.size > 0
    if not fits or not mx.issubdtype(labels.dtype, mx.integer):
        raise InvalidValueError(
            f"labels must be {n.shape[1:2]} token ids for n {n.shape}, or several for each token, got {labels.dtype} {labels.shape}."
        )


def check_top_k(top_k: int, vocab_size: int) -> None:
    """Check that 1 <= top_k <= vocab_size.

    Raises:
        InvalidValueError: if it is not.
        InvalidTypeError: if it is no whole number.
    """
    if isinstance(top_k, bool) or not hasattr(type(top_k), "__index__"):  # NumPy has whole numbers of its own
        raise InvalidTypeError(f"top_k must be a whole number, got {top_k!r:.100}.")
    if not 1 <= top_k <= vocab_size:
        raise InvalidValueError(f"top_k must be from 1 to {vocab_size} (the vocabulary), not {top_k}.")


def _no_layers(tokens: int, top_k: int, with_model: bool, labels: mx.array | None, reverse: bool) -> LensStats:
    def empty(dtype: mx.Dtype = mx.float32, *more: int) -> mx.array:
        return mx.zeros((0, tokens, *more), dtype)

    top_ids, top_logits = empty(mx.int32, top_k), empty(mx.float32, top_k)
    of_model = (empty(), empty(mx.bool_)) if with_model else (None, None)
    of_labels = (None, None) if labels is None else (empty(mx.float32, *labels.shape[1:]), empty(mx.int32, *labels.shape[1:]))
    arrays: list[Any] = [empty(), empty(), empty(), top_ids, top_logits, *of_model, *of_labels, empty() if reverse else None]
    return LensStats(*arrays)


# ---------------------------------------------------------------------- the reference


def _reference(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None, reverse: bool = False) -> list[mx.array]:
    def chunk(n: mx.array, n_model: mx.array | None, labels: mx.array | None) -> list[mx.array]:
        z_model = None if n_model is None else head_logits(n_model, head)
        stats = logits_stats(head_logits(n, head), top_k, z_model, labels, head.tokens, reverse)
        return [value for value in vars(stats).values() if value is not None]

    return in_chunks(chunk, n, [n_model, labels], head.vocab_size)


def logits_stats(
    z: mx.array,
    top_k: int = 1,
    z_model: mx.array | None = None,
    labels: mx.array | None = None,
    tokens: int | None = None,
    reverse: bool = False,
) -> LensStats:
    """Compute the statistics of given logits, in plain MLX. Lazy.

    Args:
        z: [L, N, V] logits, float32.
        top_k: number of most likely tokens to return.
        z_model: [N, V] the model's own logits; adds kl and agrees.
        labels: [N] or [N, C] token ids; adds nll and rank.
        tokens: number of ids that are tokens; the ids from `tokens` on are padding. None = all.
        reverse: add reverse_kl. Needs z_model.
    """
    log_q, q, lse = log_softmax_and_lse(z)
    kl = agrees = nll = rank = reverse_kl = None
    top_ids, top_logits = largest_logits(z, top_k)
    lost = mx.isnan(lse)[..., None]  # a row with NaN has no order: its ids only have to be valid
    top_ids, top_logits = mx.where(lost, mx.arange(top_k, dtype=mx.int32), top_ids), mx.where(lost, mx.nan, top_logits)
    if z_model is not None:
        log_p, p, _ = log_softmax_and_lse(z_model)
        kl = kl_divergence(p, log_p, log_q)
        reverse_kl = kl_divergence(q, log_q, log_p) if reverse else None
        agrees = mx.argmax(z, axis=-1) == mx.argmax(z_model, axis=-1)
    if labels is not None:
        wide = labels.astype(mx.int64).reshape(labels.shape[0], -1)
        known = (wide >= 0) & (wide < (z.shape[-1] if tokens is None else tokens))
        of_label = mx.take_along_axis(z, mx.broadcast_to(mx.where(known, wide, 0), (*z.shape[:2], wide.shape[1])), axis=-1)
        above = [mx.sum(z > of_label[..., i : i + 1], axis=-1) for i in range(wide.shape[1])]  # one comparison with all logits at a time
        nll = mx.where(known, lse[..., None] - of_label, mx.nan).reshape(z.shape[0], *labels.shape)
        rank = mx.where(known, 1 + mx.stack(above, axis=-1), -1).astype(mx.int32).reshape(z.shape[0], *labels.shape)
    return LensStats(lse, entropy(q, log_q), mx.exp(top_logits[..., 0] - lse), top_ids, top_logits, kl, agrees, nll, rank, reverse_kl)


def largest_logits(z: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the ids [..., k] int32 and the values [..., k] of the k largest logits: by falling logit, equal logits by rising id."""
    v = z.shape[-1]
    if k == 1:
        best = mx.argmax(z, axis=-1, keepdims=True)
        return best.astype(mx.int32), mx.take_along_axis(z, best, axis=-1)
    ids = mx.argpartition(-z, k - 1, axis=-1)[..., :k] if k < v else mx.broadcast_to(mx.arange(v), z.shape)
    ids = mx.sort(ids, axis=-1)
    order = mx.argsort(-mx.take_along_axis(z, ids, axis=-1), axis=-1)  # stable: equal logits keep the order of their ids
    ids = mx.take_along_axis(ids, order, axis=-1)
    return ids.astype(mx.int32), mx.take_along_axis(z, ids, axis=-1)


# ---------------------------------------------------------------------- the kernels


def _native(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None, reverse: bool = False) -> list[mx.array]:
    found: list[mx.array] = extension().lens_stats(n, native_head(head), top_k, n_model, labels, extension_precision(), reverse)
    return found


def _metal(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None, reverse: bool = False) -> list[mx.array]:
    return on_metal.lens_stats(n, head, top_k, n_model, labels, rounds_operands(), reverse)


def _why_not_native(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None, reverse: bool = False) -> str:
    return unreadable(head.weight)


def _why_not_metal(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None, reverse: bool = False) -> str:
    if top_k > on_metal.LARGEST_K:
        return f"the Metal kernels return at most {on_metal.LARGEST_K} tokens"
    rows = n.shape[1] * (n.shape[0] + (n_model is not None))
    if matrix_units.fit(rows, rounds_operands()) and not tuning.device().tensor_tiles:
        return MATRIX_UNITS_ARE_FASTER
    if reason := unreadable(head.weight):
        return reason
    of_token = 0 if labels is None else labels.size // labels.shape[0]
    asked = Asked(n.shape[0], n.shape[1], n_model is not None, top_k, of_token, reverse)
    return PLAIN_IS_FASTER if backend() == "auto" and plain_stats_are_faster(asked, Matrix.of(head.weight)) else ""


_LENS_STATS = Operation("lens_stats", _reference, native=(_why_not_native, _native), metal=(_why_not_metal, _metal))
