"""lens_kl on the GPU: a bounded chunk of logits becomes q - p, which is multiplied back with U.

Each row takes two products, the fewest possible; storing and reading a chunk costs a few percent of one. For a linear head the difference of logits
comes from the difference of rows (see csrc/cpu/lens_kl.h). The loss holds a few chunks with their gradients (`loss_bytes`), however many layers,
tokens and ids there are. The layers of a chunk share the model's own logits of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from metalens.ops.head import Head
from metalens.ops.metal import constants, cost, descriptors, encoding, matrix_units, tuning
from metalens.ops.metal.encoding import Array
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import launch
from metalens.ops.metal.matmul import linear
from metalens.ops.metal.source import pack
from metalens.ops.metal.speed import WIDENED, Matrix, mlx_multiplies_faster, parts
from metalens.ops.metal.stats import lens_stats, row_of_head

# The fraction of a row's sum |q - p| that the tiles which the second product skips may hold together: half a unit in the last place of the operands.
NEGLIGIBLE = {mx.float32: 2.0**-24, mx.float16: 2.0**-11}

MOST_CHUNKS = 400  # twice those that a row of command buffers with the most operations holds


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of an unembedding U [V, D] that decide what a loss holds.

    Attributes:
        vocab: number of rows, V.
        depth: number of columns, D.
        bits: bits of a number. 16 or more = not quantized.
        group_size: numbers that share a scale and a bias. 0 = not quantized.
    """

    vocab: int
    depth: int
    bits: int
    group_size: int

    @property
    def scales(self) -> int:
        """Scales and biases."""
        return 2 * self.vocab * self.depth // self.group_size if self.group_size else 0

    @property
    def elements(self) -> int:
        """Elements of the arrays of U: words of packed numbers, scales and biases."""
        return self.vocab * self.depth * self.bits // 32 + self.scales if self.group_size else self.vocab * self.depth

    @property
    def matrix(self) -> Matrix:
        """The matrix as the model of speed sees it, with scales of 16 bits."""
        values = self.vocab * self.depth * self.bits // 8
        of_scales = 2 * self.scales
        widened = WIDENED * (of_scales if self.group_size else values if self.bits == 16 else 0)
        return Matrix(self.vocab, self.depth, values + of_scales, widened, self.group_size > 0)


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
    n, n_model = n.astype(mx.float32), n_model.astype(mx.float32)

    def of_chunk(rows: mx.array, ts: slice, z_model: mx.array) -> tuple[mx.array, mx.array]:
        return _chunk(rows, n_model[ts], z_model, lse_model[ts], head, rounded, skip)

    (layers, tokens, depth), vocab = n.shape, head.vocab_size
    kl, gradient = in_chunks(of_chunk, n, n_model, chunk_shape(layers, tokens, vocab, depth, rounded), head, rounded)
    return kl, gradient


def in_chunks(
    of_chunk: Callable[[mx.array, slice, mx.array], Sequence[mx.array]],
    n: mx.array,
    n_model: mx.array,
    shape: tuple[int, int, int],
    head: Head,
    rounded: bool,
) -> list[mx.array]:
    """Compute arrays [L, N, ...] chunk by chunk, so that the logits of one chunk are freed before those of the next are made. Lazy.

    Args:
        of_chunk: takes rows [l, c, D], the slice of their tokens, and the products [c, V] of the model's rows; returns arrays [l, c, ...].
        n: [L, N, D] rows.
        n_model: [N, D'] the rows that those of all layers are compared with.
        shape: that of the chunks (`chunk_shape`).
        head: the unembedding of n_model.
        rounded: whether operands may be rounded to half.
    """
    layers, tokens = n.shape[:2]
    per_layers, per_tokens, of_model = shape
    parts: list[list[Sequence[mx.array]]] = []
    z_model, last = mx.zeros((0, 0)), None
    for t in range(0, tokens, per_tokens):
        if t % of_model == 0:
            z_model = linear(_after(last, n_model[t : t + of_model]), head.weight, head.bias, head.scale, rounded)
        ts, of_group = slice(t, t + per_tokens), slice(t % of_model, t % of_model + per_tokens)
        of_tokens: list[Sequence[mx.array]] = []
        for first in range(0, layers, per_layers):
            last = of_chunk(_after(last, n[first : first + per_layers, ts]), ts, z_model[of_group])
            of_tokens.append(last)
        parts.append(of_tokens)
    joined = [[mx.concatenate(list(values)) for values in zip(*of_tokens, strict=True)] for of_tokens in parts]
    return [mx.concatenate(list(values), axis=1) for values in zip(*joined, strict=True)]


def _after(last: Sequence[mx.array] | None, rows: mx.array) -> mx.array:
    """Return rows that MLX encodes after the results of the chunk before, so that it can free that chunk's logits first."""
    return rows if last is None else mx.depends([rows], list(last))[0]


def chunk_shape(layers: int, tokens: int, vocab: int, depth: int, rounded: bool) -> tuple[int, int, int]:
    """Return (layers, tokens) of a chunk (see `tuning.chunk_rows`), and the tokens for which the model's logits are computed together.

    Both fill tiles: a product of a few rows costs as much as that of a whole tile. The model's logits take at most half a chunk's memory.
    """
    gpu = tuning.device()
    on_units = rounded and matrix_units.round_float32()
    return _divided(layers, tokens, tuning.chunk_rows(vocab, depth, _gradient_type(rounded).size, gpu, on_units), gpu.generation, on_units)


@cache
def _divided(layers: int, tokens: int, rows: int, generation: tuning.GpuGeneration, on_units: bool) -> tuple[int, int, int]:
    """Return the shape of chunks of at most `rows` rows, or of one token of one layer."""

    def padded(rows: int) -> int:
        """Return the rows that a product multiplies. A chunk's kernels end with idle cores, which costs about as much as reading U."""
        return generation.rows_per_reading + (cost.up(rows, 32) if on_units else tuning.padded_rows(rows, generation))

    def of_chunks(shape: tuple[int, int]) -> int:
        return sum(m * n * padded(a * b) for a, m in parts(layers, shape[0]) for b, n in parts(tokens, shape[1]))

    def of_model(together: int) -> int:
        return sum(count * padded(size) for size, count in parts(tokens, together * per_tokens))

    # Two tiles' worth of sizes hold the best remainder; a chunk of a small vocabulary has too many rows to try them all.
    tried = 2 * max(tuning.MATMUL_BLOCKS)

    def sizes(most: int, tried: int) -> range:
        return range(most, max(most // 2, most - tried), -1)

    of_layers = sizes(min(layers, rows), tried)
    shapes = [(m, n) for m in of_layers for n in sizes(min(tokens, max(1, rows // m)), -(-tried // m))]
    per_layers, per_tokens = min(shapes, key=of_chunks)
    groups = range(1, 1 + min(max(1, rows // (2 * per_tokens)), -(-tokens // per_tokens), tried))
    return per_layers, per_tokens, per_tokens * min(groups, key=of_model)


def loss_bytes(layers: int, tokens: int, head: HeadSizes, rounded: bool) -> int:
    """Return the most bytes of logits, gradients and dequantized rows of U that exist at once, because MLX encodes ahead of the GPU (encoding.py).

    Arrays of D columns are not counted: they are small beside a chunk.

    Args:
        layers, tokens: sizes of the loss.
        head: sizes of the unembedding.
        rounded: whether operands may be rounded to half.
    """
    return encoding.most_bytes(_operations(layers, tokens, head, rounded))


def _operations(layers: int, tokens: int, head: HeadSizes, rounded: bool) -> Iterator[tuple[Array, ...]]:
    """Yield the operations of a loss, with their large arrays. A long loss repeats itself, so it ends after MOST_CHUNKS chunks."""
    vocab, depth = head.vocab, head.depth
    per_layers, per_tokens, of_model = chunk_shape(layers, tokens, vocab, depth, rounded)
    u, scales, matrix = Array(("U", 0), head.elements, 0), head.scales, head.matrix
    chunks = 0

    def product(rows: int, z: Array) -> tuple[Array, ...]:
        copies = Array((f"scales for {z.name[0]}", z.name[1]), scales, 4 * scales)
        return (u, z, copies) if matrix_units.fit(rows, rounded) or mlx_multiplies_faster(rows, matrix) else (u, z)

    for t in range(0, tokens, per_tokens):
        if t % of_model == 0:
            rows = min(of_model, tokens - t)
            z_model = Array(("model", t), rows * vocab, 4 * rows * vocab)
            yield product(rows, z_model)
        for first in range(0, layers, per_layers):
            rows = min(per_layers, layers - first) * min(per_tokens, tokens - t)
            z = Array(("logits", chunks), rows * vocab, 4 * rows * vocab)
            g = Array(("gradient", chunks), rows * vocab, _gradient_type(rounded).size * rows * vocab)
            yield product(rows, z)
            yield z, z_model, g
            if _backward_on_units(rows, rounded):
                copies = Array(("scales", chunks), scales, 4 * scales)
                step = matrix_units.rows_of_piece(depth)
                for piece in range(-(-vocab // step)):
                    size = min(step, vocab - piece * step) * depth
                    part = Array(("piece", chunks << 32 | piece), size, 4 * size)
                    yield u, copies, part
                    yield g, part
            else:
                yield u, g
            chunks += 1
            if chunks == MOST_CHUNKS:
                return


def _backward_on_units(rows: int, rounded: bool) -> bool:
    return rows >= matrix_units.FEWEST_ROWS_BACKWARD and matrix_units.fit(rows, rounded)


def _gradient_type(rounded: bool) -> mx.Dtype:
    """Return the type of a chunk's gradient. Matrix units take float32 and round it themselves."""
    return mx.float16 if rounded and not matrix_units.round_float32() else mx.float32


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
    kl, gradient = _softmax_grad(chunk, z_model, lse_model, head, _gradient_type(rounded))
    if _backward_on_units(layers * tokens, rounded):
        dn = matrix_units.backward(gradient.values, head.weight) * head.scale
    else:
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
