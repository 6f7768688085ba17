"""lens_kl on the GPU: a bounded chunk of logits, turned into q - p and multiplied back.

Two products for each row, as few as there can be: storing and reading a chunk costs a few percent of one. The difference of logits comes from the
difference of rows for a linear head (design of csrc/cpu/lens_kl.h). A chunk and its gradient are all that the loss holds, however many layers, tokens
and ids there are; the model's own logits of the chunk's tokens are shared by its layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from metalens.ops.metal import descriptors, tuning
from metalens.ops.metal.formats import Format, arrays, format_of
from metalens.ops.metal.kernel import launch
from metalens.ops.metal.source import pack
from metalens.ops.metal.stats import lens_stats

if TYPE_CHECKING:
    from metalens.ops.head import Head

# Of a row's sum |q - p|: what the tiles that the second product leaves out may add up to. Half a unit in the last place of the operands.
NEGLIGIBLE = {mx.float32: 2.0**-24, mx.float16: 2.0**-11}


def lens_target(n_model: mx.array, head: Head, rounded: bool = False) -> tuple[mx.array, mx.array]:
    """(lse, entropy) [N] of the model's rows [N, D]. Lazy."""
    lse, entropy, *_ = lens_stats(n_model[None], head, 1, rounded=rounded)
    return lse[0], entropy[0]


def linear(x: mx.array, head_or_matrix: list[mx.array], f: Format, columns: int, bias: mx.array | None, scale: float, rounded: bool) -> mx.array:
    """Scale * (x W^T + bias) [N, columns] float32 of rows x [N, D]. Lazy."""
    rows, depth = x.shape
    gpu = tuning.device()
    block = tuning.plain_block(rows, gpu.family)
    problem = {"rows": rows, "depth": depth, "columns": columns, "with_bias": int(bias is not None), "scale": scale}
    (y,) = launch(
        descriptors.linear(x.dtype, f, block, rounded, mx.float32, gpu.engine),
        [x, *head_or_matrix, mx.zeros(8) if bias is None else bias.astype(mx.float32), mx.array(pack("linear.h", "LinearProblem", problem))],
        (-(-rows // block), -(-columns // tuning.TILE_IDS), 1),
        [(rows, columns)],
        [mx.float32],
    )
    return y


def lens_kl(n: mx.array, n_model: mx.array, lse_model: mx.array, head: Head, rounded: bool = False, skip: bool = True) -> tuple[mx.array, mx.array]:
    """KL(model || lens) [L, N] in nats, and its gradient [L, N, D] at n. Lazy.

    Args:
        n: [L, N, D] lens rows after the final norm.
        n_model: [N, D] the model's own.
        lse_model: [N], of lens_target.
        head: with a weight that the kernels read.
        rounded: whether operands may be rounded to half.
        skip: leave out tiles of the second product that would not change it beyond rounding.
    """
    layers, tokens, _ = n.shape
    per_layers, per_tokens = chunk_shape(layers, tokens, head, rounded)
    n, n_model = n.astype(mx.float32), n_model.astype(mx.float32)
    parts: list[list[tuple[mx.array, mx.array]]] = []
    last: tuple[mx.array, mx.array] | None = None
    for t in range(0, tokens, per_tokens):
        ts = slice(t, t + per_tokens)
        of_model = n_model[ts]
        if last is not None:  # one chunk's logits must be gone before the next one's are made
            (of_model,) = mx.depends([of_model], list(last))
        z_model = linear(of_model, arrays(head.weight), format_of(head.weight), head.vocab_size, head.bias, head.scale, rounded)
        of_tokens: list[tuple[mx.array, mx.array]] = []
        for first in range(0, layers, per_layers):
            rows = n[first : first + per_layers, ts]
            if of_tokens:
                (rows,) = mx.depends([rows], list(of_tokens[-1]))
            last = _chunk(rows, of_model, z_model, lse_model[ts], head, rounded, skip)
            of_tokens.append(last)
        parts.append(of_tokens)
    joined = [[mx.concatenate([chunk[i] for chunk in of_tokens]) for of_tokens in parts] for i in range(2)]
    return mx.concatenate(joined[0], axis=1), mx.concatenate(joined[1], axis=1)


def chunk_shape(layers: int, tokens: int, head: Head, rounded: bool) -> tuple[int, int]:
    """(layers, tokens) of a chunk: within tuning.chunk_bytes with its gradient and the model's logits, and within one short dispatch."""
    gpu = tuning.device()
    vocab, depth = head.weight.shape
    row_bytes = vocab * (4 + (2 if rounded else 4))
    rows = max(2, min(tuning.chunk_bytes(gpu) // row_bytes, tuning.rows_per_dispatch(vocab, depth, gpu)))
    per_layers = min(layers, rows - 1)
    return per_layers, min(tokens, max(1, rows // (per_layers + 1)))


def _chunk(
    n: mx.array, n_model: mx.array, z_model: mx.array, lse_model: mx.array, head: Head, rounded: bool, skip: bool
) -> tuple[mx.array, mx.array]:
    layers, tokens, depth = n.shape
    rows, vocab = layers * tokens, head.vocab_size
    gpu, f, weight = tuning.device(), format_of(head.weight), arrays(head.weight)
    is_delta = head.softcap is None
    x = (n - n_model[None] if is_delta else n).reshape(rows, depth)
    chunk = linear(x, weight, f, vocab, None if is_delta else head.bias, head.scale, rounded)

    dtype = mx.float16 if rounded else mx.float32
    magnifier = descriptors.MAGNIFIER[dtype]
    problem = {
        "rows": rows,
        "tokens": tokens,
        "width": vocab,
        "vocab": head.tokens,
        "is_delta": int(is_delta),
        "softcap": head.softcap or 0.0,
        "magnifier": magnifier,
    }
    map_columns = -(-vocab // descriptors.MAP_WIDTH)
    g, largest, mass, kl, _, _ = launch(
        descriptors.lens_softmax_grad(dtype),
        [chunk, z_model, lse_model.astype(mx.float32), mx.array(pack("lens_softmax_grad.h", "SoftmaxGradProblem", problem))],
        (rows, 1, 1),
        [(rows, vocab), (rows, map_columns), *[(rows,)] * 4],
        [dtype, *[mx.float32] * 5],
        reuse=[0 if dtype == mx.float32 else -1, *[-1] * 5],
    )

    block = tuning.plain_block(rows, gpu.family)
    row_blocks, column_blocks = -(-rows // block), -(-depth // tuning.TILE_IDS)
    share, splits = tuning.shares(head.tokens, descriptors.MAP_WIDTH, row_blocks * column_blocks, gpu)
    back = {
        "rows": rows,
        "width": vocab,
        "vocab": head.tokens,
        "columns": depth,
        "share": share,
        "negligible": NEGLIGIBLE[dtype] if skip else -1.0,
        "scale": head.scale / magnifier,
    }
    (dn,) = launch(
        descriptors.lens_pullback(dtype, f, block, gpu.engine),
        [g, largest, mass, *weight, mx.array(pack("lens_pullback.h", "PullbackProblem", back))],
        (row_blocks, column_blocks, splits),
        [(splits, rows, depth)],
        [mx.float32],
    )
    dn = dn[0] if splits == 1 else mx.sum(dn, axis=0)
    return kl.reshape(layers, tokens), dn.reshape(layers, tokens, depth)
