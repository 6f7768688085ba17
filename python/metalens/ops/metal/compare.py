"""lens_compare on the GPU: chunks of logits, in which a kernel compares each row of one side with its row of the other."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.head import Head
from metalens.ops.metal import descriptors
from metalens.ops.metal.kernel import launch
from metalens.ops.metal.kl import chunk_shape, in_chunks
from metalens.ops.metal.matmul import linear
from metalens.ops.metal.source import pack
from metalens.ops.metal.stats import row_of_head


def lens_compare(a: mx.array, b: mx.array, head_a: Head, head_b: Head, rounded: bool) -> list[mx.array]:
    """Return [kl, reverse_kl, js, tv], each [L, N]. Lazy.

    Args:
        a: [L, N, D] rows after the final norm.
        b: [L, N, D'] rows, or [1, N, D'], which are compared with every layer of a.
        head_a, head_b: the unembeddings, of formats that the kernels read.
        rounded: whether operands may be rounded to half.
    """
    shape = layers, tokens = a.shape[:2]
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    if b.shape[0] > 1:  # pairs are tokens of one layer
        layers, tokens = 1, layers * tokens
        a, b = (rows.reshape(layers, tokens, -1) for rows in (a, b))

    def of_chunk(rows: mx.array, _: slice, z_b: mx.array) -> list[mx.array]:
        z_a = linear(rows.reshape(-1, rows.shape[-1]), head_a.weight, head_a.bias, head_a.scale, rounded)
        return [values.reshape(rows.shape[:2]) for values in _compared(z_a, z_b, head_a, head_b)]

    vocab = max(head_a.vocab_size, head_b.vocab_size)
    found = in_chunks(of_chunk, a, b[0], chunk_shape(layers, tokens, vocab, a.shape[2], rounded), head_b, rounded)
    return [values.reshape(shape) for values in found]


def _compared(z_a: mx.array, z_b: mx.array, head_a: Head, head_b: Head) -> list[mx.array]:
    """Return the four results [R] for products [R, V]; row r is compared with row r mod R' of [R', V']."""
    problem = {
        "rows_b": z_b.shape[0],
        "width_a": z_a.shape[1],
        "width_b": z_b.shape[1],
        "vocab": head_a.tokens,
        "with_offset_a": int(head_a.offset is not None),
        "with_offset_b": int(head_b.offset is not None),
        "softcap_a": head_a.softcap or 0.0,
        "softcap_b": head_b.softcap or 0.0,
    }
    return launch(
        descriptors.lens_compare(),
        [z_a, z_b, row_of_head(head_a.offset), row_of_head(head_b.offset), mx.array(pack("lens_compare.h", "CompareProblem", problem))],
        (z_a.shape[0], 1, 1),
        [z_a.shape[:1]] * 4,
        [mx.float32] * 4,
    )
