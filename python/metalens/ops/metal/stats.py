"""lens_stats on the GPU: blocks divide the rows, splits divide the vocabulary, and a second kernel merges the splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.head import Head
from metalens.ops.metal import constants, descriptors, tuning
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import Kernel, absent, launch
from metalens.ops.metal.source import pack
from metalens.ops.weight import FLOATS

LARGEST_K = 32  # the top k lie across the lanes of a simdgroup


def lens_stats(
    n: mx.array,
    head: Head,
    k: int,
    n_model: mx.array | None = None,
    labels: mx.array | None = None,
    rounded: bool = False,
    reverse: bool = False,
) -> list[mx.array]:
    """Return [lse, entropy, max_probability, top_ids, top_logits], then [kl, agrees] with n_model, [nll, rank] with labels, [reverse_kl]. Lazy.

    Args:
        n: [L, N, D] rows after the final norm.
        head: the unembedding, of a format that the kernels read.
        k: number of top tokens, at most LARGEST_K.
        n_model: [N, D] the model's own rows, or None.
        labels: [N] or [N, C] token ids, or None.
        rounded: whether operands may be rounded to half.
        reverse: whether to return reverse_kl. Needs n_model.
    """
    of_n = {n.dtype} | (set() if n_model is None else {n_model.dtype})
    if len(of_n) > 1 or not of_n <= set(FLOATS):
        n, n_model = n.astype(mx.float32), None if n_model is None else n_model.astype(mx.float32)
    if labels is not None:  # compare in a type that holds every id and every label, then narrow to 32 bits
        wide = labels.astype(mx.int64)
        labels = mx.where((wide >= 0) & (wide < head.tokens), wide, -1).astype(mx.int32)
    names = [*ALWAYS, *(WITH_MODEL if n_model is not None else ()), *(WITH_LABELS if labels is not None else ()), *(WITH_REVERSE if reverse else ())]

    def one(ls: slice, ts: slice) -> list[mx.array]:
        found = _one_dispatch(n[ls, ts], head, k, None if n_model is None else n_model[ts], None if labels is None else labels[ts], rounded)
        return [found[name] for name in names]

    by_layers = [[one(ls, ts) for ts in token_slices] for ls, token_slices in _dispatches(n, head, n_model is not None)]
    of_tokens = [[mx.concatenate(list(parts), axis=1) for parts in zip(*results, strict=True)] for results in by_layers]
    return [mx.concatenate(list(parts)) for parts in zip(*of_tokens, strict=True)]


def _dispatches(n: mx.array, head: Head, with_model: bool) -> Iterator[tuple[slice, list[slice]]]:
    """Yield slices of layers, each with slices of tokens, that keep each dispatch short."""
    layers, tokens, depth = n.shape
    rows = tuning.rows_per_dispatch(head.tokens, depth, tuning.device())
    per_layers = min(layers, max(1, rows - int(with_model)))
    per_tokens = min(tokens, max(1, rows // (per_layers + int(with_model))))
    for first in range(0, layers, per_layers):
        yield slice(first, first + per_layers), [slice(t, t + per_tokens) for t in range(0, tokens, per_tokens)]


@dataclass(frozen=True)
class Division:
    """The division of a problem's rows and vocabulary among threadgroups.

    Attributes:
        layers, tokens: the problem's. Without a model every row stands alone: all rows are tokens of one layer.
        blocks: the division of the rows.
        ids_per_split, splits: the division of the vocabulary.
        groups: threadgroups along the vocabulary. Each simdgroup of lens_stats_vector takes a split, each threadgroup of the others.
    """

    layers: int
    tokens: int
    blocks: tuning.Blocks
    ids_per_split: int
    splits: int
    groups: int


def division(layers: int, tokens: int, vocab: int, with_model: bool) -> Division:
    """Divide the statistics of L x N rows."""
    gpu = tuning.device()
    problem = (layers, tokens) if with_model else (1, layers * tokens)
    blocks = tuning.blocks(*problem, with_model, gpu.generation)
    if blocks.is_vector:
        ids_per_split, groups = tuning.vector_split(vocab, blocks.count, gpu)
        return Division(*problem, blocks, ids_per_split, groups * constants.VECTOR_SIMDS, groups)
    ids_per_split, splits = tuning.tile_split(vocab, blocks.count, gpu)
    return Division(*problem, blocks, ids_per_split, splits, splits)


def _problem(of: Division, head: Head, k: int, with_model: bool, labels: int, label_tokens: int) -> mx.array:
    """Return the words of metal/stats_rows.h's StatsProblem."""
    values = {
        "layers": of.layers,
        "tokens": of.tokens,
        "depth": head.weight.shape[1],
        "vocab": head.tokens,
        "repeat_slots": of.blocks.repeat_slots,
        "ids_per_split": of.ids_per_split,
        "k": k,
        "with_model": int(with_model),
        "labels": labels,
        "label_tokens": label_tokens,
        "with_bias": int(head.bias is not None),
        "with_offset": int(head.offset is not None),
        "block_rows": of.blocks.rows,
        "blocks": of.blocks.count,
        "splits": of.splits,
        "scale": head.scale,
        "softcap": head.softcap or 0.0,
    }
    return mx.array(pack("stats_rows.h", "StatsProblem", values))


def row_of_head(values: mx.array | None) -> mx.array:
    """Return a head's bias or offset [V] as a kernel takes it. If the head has none, the problem says so, and nothing reads what stands for it."""
    return absent() if values is None else values.astype(mx.float32)


@dataclass(frozen=True)
class _Labels:
    """The labels of a dispatch: C of each of N tokens. Without labels C is 0."""

    ids: mx.array  # [N, C] int32
    count: int
    tokens: int


def _one_dispatch(n: mx.array, head: Head, k: int, n_model: mx.array | None, labels: mx.array | None, rounded: bool) -> dict[str, mx.array]:
    """Return the results by name. Those without their input are undefined."""
    with_model, (layers, tokens) = n_model is not None, n.shape[:2]
    of = division(layers, tokens, head.tokens, with_model)
    of_labels = _Labels(absent(mx.int32), 0, 0) if labels is None else _Labels(labels, labels.size // tokens, tokens)
    problem = _problem(of, head, k, with_model, of_labels.count, of_labels.tokens)
    inputs = [n, n if n_model is None else n_model, *arrays(head.weight), row_of_head(head.bias), row_of_head(head.offset)]
    first, label_kernel = _kernels(of.blocks, n.dtype, head, rounded)
    label_logits = _label_logits(label_kernel, of.blocks, inputs, of_labels, problem)
    slots = (of.splits, of.blocks.count, of.blocks.rows)
    states = launch(
        first,
        [*inputs, label_logits, problem],
        (of.blocks.count, of.groups, 1),
        [(*slots, constants.FIELDS), (*slots, max(of_labels.count, 1)), (*slots, k), (*slots, k)],
        [mx.float32, mx.int32, mx.float32, mx.int32],
    )
    return _merged([*states, label_logits, of_labels.ids, problem], (layers, tokens), k, () if labels is None else labels.shape[1:])


def _kernels(blocks: tuning.Blocks, x: mx.Dtype, head: Head, rounded: bool) -> tuple[Kernel, Kernel]:
    """Return the kernel that reads the vocabulary, and the one that computes the labels' logits as it does."""
    weight_format = format_of(head.weight)
    if blocks.is_vector:
        return descriptors.lens_stats_vector(x, weight_format), descriptors.lens_label_logits_vector(x, weight_format)
    of_tile = (x, weight_format, blocks.rows, rounded, tuning.device().tensor_tiles)
    return descriptors.lens_stats(*of_tile), descriptors.lens_label_logits(*of_tile)


def _label_logits(kernel: Kernel, blocks: tuning.Blocks, inputs: list[mx.array], labels: _Labels, problem: mx.array) -> mx.array:
    """Return the logits of each row's labels [blocks, rows of a block, C]: once, instead of once for each split."""
    if labels.count == 0:
        return absent()
    shape = (blocks.count, blocks.rows, labels.count)
    of_group = constants.VECTOR_SIMDS if blocks.is_vector else 1  # labels of a row
    groups = (blocks.count, -(-labels.count // of_group), 1)
    (label_logits,) = launch(kernel, [*inputs, labels.ids, problem], groups, [shape], [mx.float32])
    return label_logits


ALWAYS = ("lse", "entropy", "max_probability", "top_ids", "top_logits")
WITH_MODEL = ("kl", "agrees")
WITH_LABELS = ("nll", "rank")
WITH_REVERSE = ("reverse_kl",)
_TYPES = {"top_ids": mx.int32, "agrees": mx.bool_, "rank": mx.int32}  # of the results that are not float32


def _merged(inputs: list[mx.array], shape: tuple[int, ...], k: int, of_labels: tuple[int, ...]) -> dict[str, mx.array]:
    """Return all results by name, of `shape` [L, N], [L, N, k] for the top tokens, or [L, N, *of_labels]."""
    names = (*ALWAYS, "kl", "agrees", "reverse_kl", *WITH_LABELS)
    more = {"top_ids": (k,), "top_logits": (k,), **dict.fromkeys(WITH_LABELS, of_labels)}
    layers, tokens = shape
    outputs = launch(
        descriptors.lens_stats_merge(),
        inputs,
        (-(-layers * tokens // constants.SIMDS), 1, 1),  # one row for each simdgroup
        [(*shape, *more.get(name, ())) for name in names],
        [_TYPES.get(name, mx.float32) for name in names],
    )
    return dict(zip(names, outputs, strict=True))
