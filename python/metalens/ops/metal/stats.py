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
    n: mx.array, head: Head, k: int, n_model: mx.array | None = None, labels: mx.array | None = None, rounded: bool = False
) -> list[mx.array]:
    """Return [lse, entropy, max_probability, top_ids, top_logits], then [kl, agrees] with n_model, then [nll, rank] with labels. Lazy.

    Args:
        n: [L, N, D] rows after the final norm.
        head: the unembedding, of a format that the kernels read.
        k: number of top tokens, at most LARGEST_K.
        n_model: [N, D] the model's own rows, or None.
        labels: [N] token ids, or None.
        rounded: whether operands may be rounded to half.
    """
    of_n = {n.dtype} | (set() if n_model is None else {n_model.dtype})
    if len(of_n) > 1 or not of_n <= set(FLOATS):
        n, n_model = n.astype(mx.float32), None if n_model is None else n_model.astype(mx.float32)
    if labels is not None:  # compare in a type that holds every id and every label, then narrow to 32 bits
        wide = labels.astype(mx.int64)
        labels = mx.where((wide >= 0) & (wide < head.tokens), wide, -1).astype(mx.int32)
    by_layers = [
        [
            _one_dispatch(n[ls, ts], head, k, None if n_model is None else n_model[ts], None if labels is None else labels[ts], rounded)
            for ts in token_slices
        ]
        for ls, token_slices in _dispatches(n, head, n_model is not None)
    ]
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
class _Plan:
    """The launch of the first kernel.

    Attributes:
        kernel: lens_stats or lens_stats_vector.
        of_labels: the kernel that computes the labels' logits for lens_stats. lens_stats_vector computes them itself.
        layers, tokens: the problem's. Without a model every row stands alone: all rows are tokens of one layer.
        blocks: the division of the rows.
        ids_per_split, splits: the division of the vocabulary.
        groups: threadgroups along the vocabulary.
    """

    kernel: Kernel
    of_labels: Kernel | None
    layers: int
    tokens: int
    blocks: tuning.Blocks
    ids_per_split: int
    splits: int
    groups: int


def _plan(n: mx.array, head: Head, with_model: bool, rounded: bool) -> _Plan:
    layers, tokens = n.shape[:2] if with_model else (1, n.shape[0] * n.shape[1])
    gpu, weight_format = tuning.device(), format_of(head.weight)
    blocks = tuning.blocks(layers, tokens, with_model, gpu.generation)
    if blocks.is_vector:  # each simdgroup takes a split
        kernel = descriptors.lens_stats_vector(n.dtype, weight_format)
        step, simdgroups = constants.VECTOR_IDS * constants.VECTOR_SIMDS, constants.VECTOR_SIMDS
        ids_per_split = tuning.split_vocab(head.tokens, step, blocks.count, gpu, simdgroups)[0] // simdgroups
        if ids_per_split > constants.VECTOR_PASS:  # whole passes, as each reads the rows
            ids_per_split -= ids_per_split % constants.VECTOR_PASS
        groups = -(-head.tokens // (ids_per_split * simdgroups))
        return _Plan(kernel, None, layers, tokens, blocks, ids_per_split, groups * simdgroups, groups)
    of_labels = descriptors.lens_label_logits(n.dtype, weight_format, blocks.rows, rounded)
    kernel = descriptors.lens_stats(n.dtype, weight_format, blocks.rows, rounded)
    ids_per_split, splits = tuning.split_vocab(head.tokens, constants.TILE_IDS, blocks.count, gpu, whole_steps=tuning.WHOLE_TILES)
    return _Plan(kernel, of_labels, layers, tokens, blocks, ids_per_split, splits, splits)


def _problem(plan: _Plan, head: Head, k: int, with_model: bool, label_tokens: int) -> mx.array:
    """Return the words of metal/stats_rows.h's StatsProblem."""
    values = {
        "layers": plan.layers,
        "tokens": plan.tokens,
        "depth": head.weight.shape[1],
        "vocab": head.tokens,
        "repeat_slots": plan.blocks.repeat_slots,
        "ids_per_split": plan.ids_per_split,
        "k": k,
        "with_model": int(with_model),
        "label_tokens": label_tokens,
        "with_bias": int(head.bias is not None),
        "with_offset": int(head.offset is not None),
        "block_rows": plan.blocks.rows,
        "blocks": plan.blocks.count,
        "splits": plan.splits,
        "scale": head.scale,
        "softcap": head.softcap or 0.0,
    }
    return mx.array(pack("stats_rows.h", "StatsProblem", values))


def _one_dispatch(n: mx.array, head: Head, k: int, n_model: mx.array | None, labels: mx.array | None, rounded: bool) -> list[mx.array]:
    plan = _plan(n, head, n_model is not None, rounded)
    problem = _problem(plan, head, k, n_model is not None, 0 if labels is None else n.shape[1])
    known_labels = absent(mx.int32) if labels is None else labels
    states = _states(plan, n, n if n_model is None else n_model, head, known_labels, labels is not None, problem, k)
    results = _merged(states, known_labels, problem, n.shape[:2], k)
    wanted = [*ALWAYS, *(WITH_MODEL if n_model is not None else ()), *(WITH_LABELS if labels is not None else ())]
    return [results[name] for name in wanted]


def _states(
    plan: _Plan, n: mx.array, n_model: mx.array, head: Head, labels: mx.array, with_labels: bool, problem: mx.array, k: int
) -> list[mx.array]:
    """Return what each split found about each row: states, counts above the label, top logits, top ids."""
    slots = (plan.splits, plan.blocks.count, plan.blocks.rows)
    rows_and_head = [n, n_model, *arrays(head.weight), row_of_head(head.bias), row_of_head(head.offset)]
    if plan.of_labels is not None:
        labels = _label_logits(plan, rows_and_head, labels, problem) if with_labels else absent()
    return launch(
        plan.kernel,
        [*rows_and_head, labels, problem],
        (plan.blocks.count, plan.groups, 1),
        [(*slots, constants.FIELDS), slots, (*slots, k), (*slots, k)],
        [mx.float32, mx.int32, mx.float32, mx.int32],
    )


def _label_logits(plan: _Plan, rows_and_head: list[mx.array], labels: mx.array, problem: mx.array) -> mx.array:
    """Return the logit of each row's label [blocks, rows of a block]: once, instead of once for each split."""
    assert plan.of_labels is not None
    shape = (plan.blocks.count, plan.blocks.rows)
    (label_logits,) = launch(plan.of_labels, [*rows_and_head, labels, problem], (plan.blocks.count, 1, 1), [shape], [mx.float32])
    return label_logits


def row_of_head(values: mx.array | None) -> mx.array:
    """Return a head's bias or offset [V] as a kernel takes it. If the head has none, the problem says so, and nothing reads what stands for it."""
    return absent() if values is None else values.astype(mx.float32)


ALWAYS = ("lse", "entropy", "max_probability", "top_ids", "top_logits")
WITH_MODEL = ("kl", "agrees")
WITH_LABELS = ("nll", "rank")
_TYPES = {"top_ids": mx.int32, "agrees": mx.bool_, "rank": mx.int32}  # of the results that are not float32


def _merged(states: list[mx.array], labels: mx.array, problem: mx.array, shape: tuple[int, ...], k: int) -> dict[str, mx.array]:
    """Return all results by name, of `shape` [L, N], or [L, N, k] for the top tokens. Those without their input are undefined."""
    names = (*ALWAYS, *WITH_MODEL, *WITH_LABELS)
    layers, tokens = shape
    outputs = launch(
        descriptors.lens_stats_merge(),
        [*states, labels, problem],
        (-(-layers * tokens // constants.SIMDS), 1, 1),  # one row for each simdgroup
        [(*shape, k) if name in ("top_ids", "top_logits") else shape for name in names],
        [_TYPES.get(name, mx.float32) for name in names],
    )
    return dict(zip(names, outputs, strict=True))
