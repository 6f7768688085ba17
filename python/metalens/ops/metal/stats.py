"""lens_stats on the GPU: rows dealt to blocks, the vocabulary to splits, two kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

from metalens.ops.metal import descriptors, tuning
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import launch
from metalens.ops.metal.source import pack
from metalens.ops.weight import FLOATS

if TYPE_CHECKING:
    from metalens.ops.head import Head

LARGEST_K = 32  # the top k lie across the lanes of a simdgroup
FIELDS = 8  # of a row's state, metal/stats_rows.h
IDS = 4  # that lens_stats_few takes in a step
SIMDS = 4  # of a threadgroup


def lens_stats(
    n: mx.array, head: Head, k: int, n_model: mx.array | None = None, labels: mx.array | None = None, rounded: bool = False
) -> list[mx.array]:
    """[lse, entropy, max_probability, top_ids, top_logits], then [kl, agrees] with n_model, then [nll, rank] with labels. Lazy.

    Args:
        n: [L, N, D] rows after the final norm.
        head: with a weight that the kernels read.
        k: at most LARGEST_K.
        n_model: [N, D] or None.
        labels: [N] or None.
        rounded: whether operands may be rounded to half.
    """
    of_n = {n.dtype} | (set() if n_model is None else {n_model.dtype})
    if len(of_n) > 1 or not of_n <= set(FLOATS):
        n, n_model = n.astype(mx.float32), None if n_model is None else n_model.astype(mx.float32)
    if labels is not None:  # compared in a type that holds every id and every label, before they are narrowed to 32 bits
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
    """Slices of layers and of tokens that keep each dispatch short."""
    layers, tokens, depth = n.shape
    rows = tuning.rows_per_dispatch(head.tokens, depth, tuning.device())
    per_layers = min(layers, max(1, rows - int(with_model)))
    per_tokens = min(tokens, max(1, rows // (per_layers + int(with_model))))
    for first in range(0, layers, per_layers):
        yield slice(first, first + per_layers), [slice(t, t + per_tokens) for t in range(0, tokens, per_tokens)]


def _one_dispatch(n: mx.array, head: Head, k: int, n_model: mx.array | None, labels: mx.array | None, rounded: bool) -> list[mx.array]:
    layers, tokens, depth = n.shape
    gpu, f = tuning.device(), format_of(head.weight)
    with_model = n_model is not None
    # Without a model every row stands for itself: they are tokens of one layer.
    problem_layers, problem_tokens = (layers, tokens) if with_model else (1, layers * tokens)
    blocks = tuning.blocks(problem_layers, problem_tokens, with_model, gpu.family)
    if blocks.few:
        kernel = descriptors.lens_stats_few(n.dtype, f, blocks.rows)
        share, splits = tuning.shares(head.tokens, IDS, blocks.count, gpu)
        groups = -(-splits // SIMDS)
        splits = groups * SIMDS
    else:
        kernel = descriptors.lens_stats(n.dtype, f, blocks.rows, rounded, gpu.engine)
        share, splits = tuning.shares(head.tokens, tuning.TILE_IDS, blocks.count, gpu)
        groups = splits
    problem = mx.array(
        pack(
            "stats_rows.h",
            "StatsProblem",
            {
                "layers": problem_layers,
                "tokens": problem_tokens,
                "depth": depth,
                "vocab": head.tokens,
                "reserved": blocks.reserved,
                "share": share,
                "k": k,
                "with_model": int(with_model),
                "label_tokens": 0 if labels is None else tokens,
                "with_bias": int(head.bias is not None),
                "block_rows": blocks.rows,
                "blocks": blocks.count,
                "splits": splits,
                "scale": head.scale,
                "softcap": head.softcap or 0.0,
            },
        )
    )
    unused = mx.zeros(8)
    known = mx.zeros(8, mx.int32) if labels is None else labels
    slots = (splits, blocks.count, blocks.rows)
    states = launch(
        kernel,
        [
            n,
            n if n_model is None else n_model,
            *arrays(head.weight),
            unused if head.bias is None else head.bias.astype(mx.float32),
            known,
            problem,
        ],
        (blocks.count, groups, 1),
        [(*slots, FIELDS), slots, (*slots, k), (*slots, k)],
        [mx.float32, mx.int32, mx.float32, mx.int32],
    )
    of_row = (layers, tokens)
    lse, entropy, largest, ids, logits, kl, agrees, nll, rank = launch(
        descriptors.lens_stats_merge(),
        [*states, known, problem],
        (-(-layers * tokens // descriptors.MERGE_ROWS), 1, 1),
        [of_row, of_row, of_row, (*of_row, k), (*of_row, k), of_row, of_row, of_row, of_row],
        [mx.float32, mx.float32, mx.float32, mx.int32, mx.float32, mx.float32, mx.bool_, mx.float32, mx.int32],
    )
    return [lse, entropy, largest, ids, logits, *([kl, agrees] if with_model else []), *([nll, rank] if labels is not None else [])]
