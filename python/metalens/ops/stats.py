"""lens_stats: top-k, entropy, KL to the model, NLL and rank of a label for every row of logits, without holding all logits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.backends import extension, extension_precision, rounds_operands
from metalens.ops.chunks import in_chunks
from metalens.ops.dispatch import Operation
from metalens.ops.head import Head
from metalens.ops.logits import head_logits, native_head
from metalens.ops.metal import stats as on_metal
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
        nll: [L, N] -log q(label), or None without labels.
        rank: [L, N] int32 rank of the label, 1 = most likely; None without labels.
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


def lens_stats(
    n: mx.array, head: Head, top_k: int = 1, n_model: mx.array | None = None, labels: mx.array | None = None, *, k: int | None = None
) -> LensStats:
    """Compute the statistics of every row, without holding all logits. Lazy; not differentiable.

    Args:
        n: [L, N, D] rows after the final norm: L layers of N tokens, N >= 1.
        head: the unembedding.
        top_k: number of most likely tokens to return, 1 <= top_k <= head.tokens. If several tokens have the same logit as
            the last of them, any of these tokens may be returned.
        n_model: [N, D] the model's own rows; adds kl and agrees.
        labels: [N] token ids; adds nll and rank. A label that is not a token gives NaN and -1.
        k: the former name of top_k. Deprecated.

    Raises:
        InvalidValueError: if top_k is out of range, or the shapes do not fit together.
    """
    if k is not None:
        if top_k != 1:
            raise InvalidTypeError("lens_stats got both top_k and k, its former name. Pass top_k only.")
        warnings.warn("lens_stats(k=) is now top_k=; the old name will be removed in the next release.", DeprecationWarning, stacklevel=2)
        top_k = k
    _check(n, head, top_k, n_model, labels)
    if n.shape[0] == 0:
        return _no_layers(n.shape[1], top_k, n_model is not None, labels is not None)
    found = iter(_LENS_STATS(n, head, top_k, n_model, labels))
    stats = [next(found) for _ in range(5)]
    of_model = [next(found) if n_model is not None else None for _ in range(2)]
    of_labels = [next(found) if labels is not None else None for _ in range(2)]
    return LensStats(*stats, *of_model, *of_labels)


def _check(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None) -> None:
    d = head.weight.shape[1]
    check_top_k(top_k, head.tokens)
    if n.ndim != 3 or n.shape[-1] != d or n.shape[1] == 0:
        raise InvalidValueError(f"lens_stats needs n [L, N, {d}] with N >= 1, got {n.shape}.")
    if n_model is not None and n_model.shape != n.shape[1:]:
        raise InvalidValueError(f"n_model must be {n.shape[1:]} for n {n.shape}, got {n_model.shape}.")
    if labels is not None and (labels.shape != n.shape[1:2] or not mx.issubdtype(labels.dtype, mx.integer)):
        raise InvalidValueError(f"labels must be {n.shape[1:2]} token ids for n {n.shape}, got {labels.dtype} {labels.shape}.")


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


def _no_layers(tokens: int, top_k: int, with_model: bool, with_labels: bool) -> LensStats:
    def empty(dtype: mx.Dtype = mx.float32) -> mx.array:
        return mx.zeros((0, tokens), dtype)

    top_ids, top_logits = mx.zeros((0, tokens, top_k), mx.int32), mx.zeros((0, tokens, top_k))
    of_model = (empty(), empty(mx.bool_)) if with_model else (None, None)
    of_labels = (empty(), empty(mx.int32)) if with_labels else (None, None)
    return LensStats(empty(), empty(), empty(), top_ids, top_logits, *of_model, *of_labels)


# ---------------------------------------------------------------------- the reference


def _reference(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None) -> list[mx.array]:
    def chunk(n: mx.array, n_model: mx.array | None, labels: mx.array | None) -> list[mx.array]:
        z_model = None if n_model is None else head_logits(n_model, head)
        stats = logits_stats(head_logits(n, head), top_k, z_model, labels, head.tokens)
        return [value for value in vars(stats).values() if value is not None]

    return in_chunks(chunk, n, [n_model, labels], head.vocab_size)


def logits_stats(
    z: mx.array, top_k: int = 1, z_model: mx.array | None = None, labels: mx.array | None = None, tokens: int | None = None
) -> LensStats:
    """Compute the statistics of given logits, in plain MLX. Lazy.

    Args:
        z: [L, N, V] logits, float32.
        top_k: number of most likely tokens to return.
        z_model: [N, V] the model's own logits; adds kl and agrees.
        labels: [N] token ids; adds nll and rank.
        tokens: number of ids that are tokens; the ids from `tokens` on are padding. None = all.
    """
    log_q, q, lse = log_softmax_and_lse(z)
    kl = agrees = nll = rank = None
    top_ids, top_logits = largest_logits(z, top_k)
    lost = mx.isnan(lse)[..., None]  # a row with NaN has no order: its ids only have to be valid
    top_ids, top_logits = mx.where(lost, mx.arange(top_k, dtype=mx.int32), top_ids), mx.where(lost, mx.nan, top_logits)
    if z_model is not None:
        log_p, p, _ = log_softmax_and_lse(z_model)
        kl = kl_divergence(p, log_p, log_q)
        agrees = mx.argmax(z, axis=-1) == mx.argmax(z_model, axis=-1)
    if labels is not None:
        wide = labels.astype(mx.int64)
        known = (wide >= 0) & (wide < (z.shape[-1] if tokens is None else tokens))
        ids = mx.where(known, wide, 0)[None, :, None]
        of_label = mx.take_along_axis(z, mx.broadcast_to(ids, (*z.shape[:2], 1)), axis=-1)
        nll = mx.where(known, lse - of_label[..., 0], mx.nan)
        rank = mx.where(known, 1 + mx.sum(z > of_label, axis=-1), -1).astype(mx.int32)
    return LensStats(lse, entropy(q, log_q), mx.exp(top_logits[..., 0] - lse), top_ids, top_logits, kl, agrees, nll, rank)


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


def _native(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None) -> list[mx.array]:
    found: list[mx.array] = extension().lens_stats(n, native_head(head), top_k, n_model, labels, extension_precision())
    return found


def _metal(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None) -> list[mx.array]:
    return on_metal.lens_stats(n, head, top_k, n_model, labels, rounds_operands())


def _why_not_native(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None) -> str:
    return unreadable(head.weight)


def _why_not_metal(n: mx.array, head: Head, top_k: int, n_model: mx.array | None, labels: mx.array | None) -> str:
    return unreadable(head.weight) if top_k <= on_metal.LARGEST_K else f"the Metal kernels return at most {on_metal.LARGEST_K} tokens"


_LENS_STATS = Operation("lens_stats", _reference, native=(_why_not_native, _native), metal=(_why_not_metal, _metal))
