"""lens_stats: what a row of logits says (top-k, entropy, KL to the model, NLL and rank of a label), a chunk of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.backends import metal, precision
from metalens.ops.chunks import in_chunks
from metalens.ops.head import Head
from metalens.ops.logits import head_logits, native_head
from metalens.ops.metal import stats as on_metal
from metalens.ops.softmax import entropy, kl_divergence, log_softmax_and_lse
from metalens.ops.weight import kernels_support
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class LensStats:
    """Statistics of L x N rows of logits; nats, float32 unless said.

    Attributes:
        lse: [L, N] log-sum-exp of the logits.
        entropy: [L, N].
        max_probability: [L, N].
        top_ids: [L, N, k] int32, by falling logit, equal logits by rising id.
        top_logits: [L, N, k].
        kl: [L, N] KL(model || row), or None without n_model.
        agrees: [L, N] bool, whether the row's most likely token is the model's; None without n_model.
        nll: [L, N] -log q(label), or None without labels.
        rank: [L, N] int32, 1 = the label is the most likely; None without labels.
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


def lens_stats(n: mx.array, head: Head, k: int = 1, n_model: mx.array | None = None, labels: mx.array | None = None) -> LensStats:
    """Statistics of every row, without ever holding all logits. Lazy; not differentiable.

    Args:
        n: [L, N, D] rows after the final norm: L layers of N tokens, N >= 1.
        head: the unembedding.
        k: how many of the most likely tokens to name, 1 <= k <= head.tokens. Of tokens with equal logits around the k-th place, any may be named.
        n_model: [N, D] the model's own rows; adds kl and agrees.
        labels: [N] token ids; adds nll and rank. A label that is no token has NaN and -1.

    Raises:
        ValueError: if k is out of range or the shapes do not fit together.
    """
    _, d = head.weight.shape
    check_top_k(k, head.tokens)
    if n.ndim != 3 or n.shape[-1] != d or n.shape[1] == 0:
        raise InvalidValueError(f"lens_stats needs n [L, N, {d}] with N >= 1, got {n.shape}.")
    if n_model is not None and n_model.shape != n.shape[1:]:
        raise InvalidValueError(f"n_model must be {n.shape[1:]} for n {n.shape}, got {n_model.shape}.")
    if labels is not None and (labels.shape != n.shape[1:2] or not mx.issubdtype(labels.dtype, mx.integer)):
        raise InvalidValueError(f"labels must be {n.shape[1:2]} token ids for n {n.shape}, got {labels.dtype} {labels.shape}.")
    if n.shape[0] == 0:
        return _no_layers(n.shape[1], k, n_model is not None, labels is not None)
    if k <= on_metal.LARGEST_K and kernels_support(head.weight) and metal():
        results = on_metal.lens_stats(n, head, k, n_model, labels, precision() == "bf16")
    elif (found := native_head(head)) is not None:
        extension, kernel_head = found
        results = extension.lens_stats(n, kernel_head, k, n_model, labels, precision())
    else:

        def chunk(n: mx.array, n_model: mx.array | None, labels: mx.array | None) -> list[mx.array]:
            z_model = None if n_model is None else head_logits(n_model, head)
            stats = logits_stats(head_logits(n, head), k, z_model, labels, head.tokens)
            return [value for value in vars(stats).values() if value is not None]

        results = in_chunks(chunk, n, [n_model, labels], head.vocab_size)
    given = iter(results)
    stats = [next(given) for _ in range(5)]
    of_model = [next(given) if n_model is not None else None for _ in range(2)]
    of_labels = [next(given) if labels is not None else None for _ in range(2)]
    return LensStats(*stats, *of_model, *of_labels)


def _no_layers(tokens: int, k: int, with_model: bool, with_labels: bool) -> LensStats:
    def empty(dtype: mx.Dtype = mx.float32) -> mx.array:
        return mx.zeros((0, tokens), dtype)

    top_ids, top_logits = mx.zeros((0, tokens, k), mx.int32), mx.zeros((0, tokens, k))
    of_model = (empty(), empty(mx.bool_)) if with_model else (None, None)
    of_labels = (empty(), empty(mx.int32)) if with_labels else (None, None)
    return LensStats(empty(), empty(), empty(), top_ids, top_logits, *of_model, *of_labels)


def check_top_k(k: int, vocab_size: int) -> None:
    """Raise ValueError unless 1 <= k <= V."""
    if not 1 <= k <= vocab_size:
        raise InvalidValueError(f"top_k must be from 1 to {vocab_size} (the vocabulary), not {k}.")


def top_k(z: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Ids [..., k] int32 and logits [..., k] of the k largest, by falling logit, equal logits by rising id."""
    v = z.shape[-1]
    if k == 1:
        best = mx.argmax(z, axis=-1, keepdims=True)
        return best.astype(mx.int32), mx.take_along_axis(z, best, axis=-1)
    ids = mx.argpartition(-z, k - 1, axis=-1)[..., :k] if k < v else mx.broadcast_to(mx.arange(v), z.shape)
    ids = mx.sort(ids, axis=-1)
    order = mx.argsort(-mx.take_along_axis(z, ids, axis=-1), axis=-1)  # stable: equal logits keep their ids' order
    ids = mx.take_along_axis(ids, order, axis=-1)
    return ids.astype(mx.int32), mx.take_along_axis(z, ids, axis=-1)


def logits_stats(z: mx.array, k: int = 1, z_model: mx.array | None = None, labels: mx.array | None = None, tokens: int | None = None) -> LensStats:
    """The statistics of logits [L, N, V] float32 that are at hand already. Lazy.

    `z_model` [N, V] are the model's own; ids from `tokens` on are padding.
    """
    log_q, q, lse = log_softmax_and_lse(z)
    kl = agrees = nll = rank = None
    top_ids, top_logits = top_k(z, k)
    lost = mx.isnan(lse)[..., None]  # nothing can be named: the ids are only valid ones
    top_ids, top_logits = mx.where(lost, mx.arange(k, dtype=mx.int32), top_ids), mx.where(lost, mx.nan, top_logits)
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
