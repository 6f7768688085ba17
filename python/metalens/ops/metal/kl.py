"""lens_kl on the GPU: a bounded chunk of logits becomes q - p, which is multiplied back with U.

Each row takes two products, the fewest possible; storing and reading a chunk costs a few percent of one. For a linear head the difference of logits
comes from the difference of rows (see csrc/cpu/lens_kl.h). The loss holds only a chunk and its gradient, however many layers, tokens and ids there
are. The layers of a chunk share the model's own logits of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from metalens.ops.head import Head
from metalens.ops.metal import constants, descriptors, tuning
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import launch
from metalens.ops.metal.matmul import linear
from metalens.ops.metal.source import pack
from metalens.ops.metal.stats import lens_stats, row_of_head

# The fraction of a row's sum |q - p| that the tiles which the second product skips may hold together: half a unit in the last place of the operands.
NEGLIGIBLE = {mx.float32: 2.0**-24, mx.float16: 2.0**-11}


def lens_target(n_model: mx.array, head: Head, rounded: bool = False) -> tuple[mx.array, mx.array]:
    """Return (lse, entropy) [N] of the model's rows [N, D]. Lazy."""
    lse, entropy, *_ = lens_stats(n_model[None], head, 1, rounded=rounded)
    return lse[0], entropy[0]


def lens_kl(n: mx.array, n_model: mx.array, lse_model: mx.array, head: Head, rounded: bool = False, skip: bool = True) -> tuple[mx.array, mx.array]:
    """Return KL(model || lens) [L, N] in nats, and its gradient [L, N, D] at n. Lazy.

    Args:
        n: [L, N, D] lens rows after the final norm.
        n_model: [N, D] the model's own rows.
        lse_model: [N] the first result of lens_target.
        head: the unembedding, of a format that the kernels read.
        rounded: whether operands may be rounded to half.
        skip: whether the second product skips tiles that would change it by no more than rounding does.
    """
    layers, tokens, _ = n.shape
    per_layers, per_tokens = chunk_shape(layers, tokens, head, rounded)
    n, n_model = n.astype(mx.float32), n_model.astype(mx.float32)
    parts: list[list[tuple[mx.array, mx.array]]] = []
    last: tuple[mx.array, mx.array] | None = None
    for t in range(0, tokens, per_tokens):
        ts = slice(t, t + per_tokens)
        of_model = n_model[ts]
        if last is not None:  # one chunk's logits must be freed before the next chunk's are computed
            (of_model,) = mx.depends([of_model], list(last))
        z_model = linear(of_model, head.weight, head.bias, head.scale, rounded)
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
    """Return (layers, tokens) of a chunk that fits chunk_bytes, with its gradient and the model's logits, and whose products are short dispatches."""
    gpu = tuning.device()
    vocab, depth = head.weight.shape
    row_bytes = vocab * (4 + (2 if rounded else 4))
    rows = max(2, min(tuning.chunk_bytes(gpu) // row_bytes, tuning.rows_per_dispatch(vocab, depth, gpu)))
    per_layers = min(layers, rows - 1)
    return per_layers, min(tokens, max(1, rows // (per_layers + 1)))


@dataclass(frozen=True)
class _Gradient:
    """The results of lens_softmax_grad that the second product takes, for a chunk of R rows."""

    values: mx.array  # [R, V] grad_scale * (q - p)
    tile_absmax: mx.array  # [R, ceil(V / MAP_WIDTH)] largest |q - p|
    row_l1: mx.array  # [R] sum |q - p|


def _chunk(
    n: mx.array, n_model: mx.array, z_model: mx.array, lse_model: mx.array, head: Head, rounded: bool, skip: bool
) -> tuple[mx.array, mx.array]:
    layers, tokens, depth = n.shape
    is_delta = head.softcap is None
    x = (n - n_model[None] if is_delta else n).reshape(layers * tokens, depth)
    chunk = linear(x, head.weight, None if is_delta else head.bias, head.scale, rounded)
    kl, gradient = _softmax_grad(chunk, z_model, lse_model, head, mx.float16 if rounded else mx.float32)
    dn = _backward(gradient, head, skip)
    return kl.reshape(layers, tokens), dn.reshape(layers, tokens, depth)


def _softmax_grad(chunk: mx.array, z_model: mx.array, lse_model: mx.array, head: Head, dtype: mx.Dtype) -> tuple[mx.array, _Gradient]:
    """Return the KL [R] and the gradient, of type `dtype`, of a chunk of logits [R, V]."""
    rows, width = chunk.shape
    problem = {
        "rows": rows,
        "tokens": z_model.shape[0],
        "width": width,
        "vocab": head.tokens,
        "is_delta": int(head.softcap is None),
        "with_offset": int(head.offset is not None),
        "softcap": head.softcap or 0.0,
        "grad_scale": descriptors.GRAD_SCALE[dtype],
    }
    values, tile_absmax, row_l1, kl, _, _ = launch(
        descriptors.lens_softmax_grad(dtype),
        [
            chunk,
            z_model,
            lse_model.astype(mx.float32),
            row_of_head(head.offset),
            mx.array(pack("lens_softmax_grad.h", "SoftmaxGradProblem", problem)),
        ],
        (rows, 1, 1),
        [(rows, width), (rows, -(-width // constants.MAP_WIDTH)), *[(rows,)] * 4],
        [dtype, *[mx.float32] * 5],
        reuse=[0 if dtype == mx.float32 else -1, *[-1] * 5],
    )
    return kl, _Gradient(values, tile_absmax, row_l1)


def _backward(gradient: _Gradient, head: Head, skip: bool) -> mx.array:
    """Return dn [R, D], the gradient at the rows."""
    (rows, width), dtype, depth = gradient.values.shape, gradient.values.dtype, head.weight.shape[1]
    gpu = tuning.device()
    block = tuning.matmul_block(rows, gpu.generation)
    row_blocks, column_blocks = -(-rows // block), -(-depth // constants.TILE_IDS)
    ids_per_split, splits = tuning.split_vocab(head.tokens, constants.MAP_WIDTH, row_blocks * column_blocks, gpu)
    problem = {
        "rows": rows,
        "width": width,
        "vocab": head.tokens,
        "columns": depth,
        "ids_per_split": ids_per_split,
        "negligible": NEGLIGIBLE[dtype] if skip else -1.0,
        "scale": head.scale / descriptors.GRAD_SCALE[dtype],
    }
    (dn,) = launch(
        descriptors.lens_backward(dtype, format_of(head.weight), block),
        [
            gradient.values,
            gradient.tile_absmax,
            gradient.row_l1,
            *arrays(head.weight),
            mx.array(pack("lens_backward.h", "LensBackwardProblem", problem)),
        ],
        (row_blocks, column_blocks, splits),
        [(splits, rows, depth)],
        [mx.float32],
    )
    return dn[0] if splits == 1 else mx.sum(dn, axis=0)
