"""The matrix of cells kernel x format x type x shape. Each cell compares a kernel with float64 and with plain MLX in the same type.

The tests run the matrix in emulation (test_matrix.py), `make mac-check` runs it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from metalens.ops import Head, Norm, Weight, lens_compare, lens_kl, lens_stats, lens_target, translate_norm, use_precision
from metalens.ops.compare import logits_comparison
from metalens.ops.metal import matmul as metal_matmul
from metalens.ops.stats import logits_stats
from metalens.ops.weight import KERNEL_FORMATS
from support import oracle

TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# float16 cells permit rounded operands, so operands are half. Operands of the other types are float32, to which bfloat16 is widened.
PRECISION: dict[str, Literal["float32", "bfloat16"]] = {"float32": "float32", "float16": "bfloat16", "bfloat16": "float32"}
# The relative error of float32 sums of a few hundred terms and, for float16, of one rounding of the operands.
EPSILON = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 3e-6}


@dataclass(frozen=True)
class Shape:
    """The rows and widths of a cell. `width` counts groups of the format, so that any group size fits."""

    layers: int
    tokens: int
    vocab: int
    width: int


# One shape of each kind: whole tiles; primes larger than a tile; a single row and a vocabulary of one token; few rows.
SHAPES = {
    "tiles": Shape(3, 8, 128, 4),
    "primes": Shape(3, 7, 131, 3),
    "one": Shape(1, 1, 1, 1),
    "few": Shape(2, 2, 67, 2),
}


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix."""

    kernel: str
    mode: str
    bits: int
    group_size: int
    dtype: str
    shape: str

    def __str__(self) -> str:
        form = self.mode if self.mode != "affine" else f"affine{self.bits}g{self.group_size}"
        return f"{self.kernel}-{form}-{self.dtype}-{self.shape}"


@dataclass(frozen=True)
class Errors:
    """The largest differences from float64, relative to the largest value (at least 1)."""

    ours: float
    plain: float
    epsilon: float

    @property
    def good(self) -> bool:
        """Whether the error is at most that of plain MLX in the same type, plus an epsilon."""
        return self.ours <= self.plain + self.epsilon


# A format of each kind, for what does not depend on the format: an offset of the logits, which has cells beside those without, and lens_compare,
# whose product is that of lens_stats.
WITH_OFFSET = "_offset"
FEW_FORMATS = (("dense", 0, 0), ("affine", 4, 64), ("nvfp4", 4, 16))


def formats() -> Iterator[tuple[str, int, int]]:
    """Yield (mode, bits, group size) of all formats that the kernels read."""
    yield ("dense", 0, 0)
    for mode, (widths, group_sizes) in KERNEL_FORMATS.items():
        for bits in widths:
            for group_size in group_sizes:
                yield (mode, bits, group_size)


def cells() -> list[Cell]:
    """Return all cells of the matrix."""
    found = []
    for mode, bits, group_size in formats():
        for dtype in TYPES:
            found += [Cell("lens_stats", mode, bits, group_size, dtype, shape) for shape in ("tiles", "primes")]
            found += [Cell("lens_stats_vector", mode, bits, group_size, dtype, shape) for shape in ("one", "few")]
            found += [Cell("linear", mode, bits, group_size, dtype, shape) for shape in ("tiles", "primes", "one")]
        found += [Cell("lens_kl", mode, bits, group_size, dtype, shape) for dtype in ("float32", "float16") for shape in ("tiles", "primes", "one")]
    heads = [c for c in found if c.kernel != "linear" and (c.mode, c.bits, c.group_size) in FEW_FORMATS]
    found += [replace(cell, kernel=cell.kernel + WITH_OFFSET) for cell in heads]
    found += [Cell("lens_compare", *form, dtype, shape) for form in FEW_FORMATS for dtype in TYPES for shape in ("primes", "one")]
    found += [Cell(f"translate_norm_{kind}", "dense", 0, 0, dtype, shape) for kind in ("rms", "layer") for dtype in TYPES for shape in SHAPES]
    return found


# Formats of the tiles of tensor operations (metal/tensor_tile.h): every kind of scale, codes of several widths, dense ones.
TENSOR_FORMATS = (
    ("dense", 0, 0),
    *(("affine", bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)),
    *(("affine", 3, 64), ("affine", 6, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)),
)


def tensor_cells() -> list[Cell]:
    """Return the cells of the kernels with tiles of tensor operations, which only GPUs with matrix units run."""
    found = []
    for mode, bits, group_size in TENSOR_FORMATS:
        for dtype in TYPES:
            found += [Cell("lens_stats", mode, bits, group_size, dtype, shape) for shape in ("tiles", "primes")]
            found += [Cell("linear", mode, bits, group_size, dtype, shape) for shape in ("tiles", "primes", "one")]
    return [*found, Cell("lens_kl", "affine", 4, 64, "float32", "primes")]


def _weight(rng: np.random.Generator, cell: Cell, rows: int, depth: int) -> Weight:
    if cell.mode == "dense":
        return Weight(oracle.random_array(rng, rows, depth, dtype=TYPES[cell.dtype], scale=0.2))
    if cell.mode == "affine":
        return oracle.random_weight(rng, rows, depth, cell.bits, cell.group_size, TYPES[cell.dtype], scale=0.2)
    # Scales as small as those of trained weights: the scales of random_float_weight would give logits in the thousands.
    return Weight(*mx.quantize(oracle.random_array(rng, rows, depth, scale=0.2), mode=cell.mode), None, cell.group_size, cell.bits, cell.mode)


def _plain_product(x: mx.array, w: Weight) -> mx.array:
    """Return x W^T from plain MLX, in x's type."""
    if w.scales is None:
        return x @ w.values.T
    return mx.quantized_matmul(x, w.values, w.scales, w.biases, True, w.group_size, w.bits, w.mode)


def _worst(found: list[mx.array], expected: list[np.ndarray]) -> float:
    def error(a: mx.array, e: np.ndarray) -> float:
        return float(np.max(np.abs(oracle.wide(a) - e)) / max(1.0, float(np.max(np.abs(e)))))

    return max(error(a, e) for a, e in zip(found, expected, strict=True))


def _setting(cell: Cell) -> tuple[np.random.Generator, Shape, int]:
    shape = SHAPES[cell.shape]
    depth = shape.width * (max(cell.group_size, 32) if cell.group_size else 8)  # MLX itself does not unpack nvfp4 rows of fewer than 32 columns
    if cell.mode == "dense" and cell.shape == "primes":
        depth = 61  # a dense weight needs no whole groups
    return np.random.default_rng(sum(map(ord, str(cell)))), shape, depth


def _head(rng: np.random.Generator, cell: Cell, shape: Shape, depth: int) -> Head:
    head = Head(_weight(rng, cell, shape.vocab, depth), oracle.random_array(rng, shape.vocab), 0.5)
    return replace(head, offset=oracle.random_array(rng, shape.vocab, scale=3)) if cell.kernel.endswith(WITH_OFFSET) else head


def _plain_logits(rows: mx.array, head: Head) -> mx.array:
    """Return the logits from plain MLX: the product in the rows' type, the rest in float32."""
    z = ((_plain_product(rows, head.weight) + head.bias.astype(rows.dtype)) * head.scale).astype(mx.float32)
    return z if head.offset is None else z + head.offset


def _stats(cell: Cell) -> Callable[[], Errors]:
    rng, shape, depth = _setting(cell)
    head = _head(rng, cell, shape, depth)
    dtype, k = TYPES[cell.dtype], min(5, shape.vocab)
    n_model = oracle.random_array(rng, shape.tokens, depth, dtype=dtype)
    n = (n_model[None].astype(mx.float32) + oracle.random_array(rng, shape.layers, shape.tokens, depth, scale=0.3)).astype(dtype)
    labels = mx.array(rng.integers(0, shape.vocab, (shape.tokens, 2)))
    with use_precision(PRECISION[cell.dtype]):
        ours = lens_stats(n, head, k, n_model, labels, reverse=True)

    def values(stats) -> list[mx.array]:
        return [stats.lse, stats.entropy, stats.max_probability, stats.top_logits, stats.kl, stats.reverse_kl, stats.nll]

    def compare() -> Errors:
        z, z_model = oracle.head_logits(oracle.wide(n), head), oracle.head_logits(oracle.wide(n_model), head)
        order = np.argsort(-z, axis=-1, kind="stable")[..., :k]
        top = np.take_along_axis(z, order, axis=-1)
        log_q = oracle.log_softmax(z)
        lse = z[..., 0] - log_q[..., 0]
        of_label = np.take_along_axis(z, np.array(labels)[None].repeat(shape.layers, 0), axis=-1)
        kl, reverse_kl = oracle.kl(z_model[None], z), oracle.kl(z, z_model[None])
        expected = [lse, oracle.entropy(z), np.exp(top[..., 0] - lse), top, kl, reverse_kl, lse[..., None] - of_label]
        if cell.dtype != "float16":  # rounded operands may swap two ids with nearly equal logits
            np.testing.assert_array_equal(np.array(ours.top_ids), order)
            np.testing.assert_array_equal(np.array(ours.rank), 1 + np.sum(z[..., None, :] > of_label[..., None], axis=-1))
            np.testing.assert_array_equal(np.array(ours.agrees), z.argmax(-1) == z_model.argmax(-1))
        of_plain = logits_stats(_plain_logits(n, head), k, _plain_logits(n_model, head), labels, reverse=True)
        return Errors(_worst(values(ours), expected), _worst(values(of_plain), expected), EPSILON[cell.dtype])

    return compare


def _compare(cell: Cell) -> Callable[[], Errors]:
    rng, shape, depth = _setting(cell)
    head, dtype = _head(rng, cell, shape, depth), TYPES[cell.dtype]
    b = oracle.random_array(rng, 1, shape.tokens, depth, dtype=dtype)
    a = (b.astype(mx.float32) + oracle.random_array(rng, shape.layers, shape.tokens, depth, scale=0.3)).astype(dtype)
    with use_precision(PRECISION[cell.dtype]):
        ours = lens_compare(a, b, head)

    def compare() -> Errors:
        expected = list(oracle.comparison(*(oracle.head_logits(oracle.wide(rows), head) for rows in (a, b))).values())
        of_plain = logits_comparison(_plain_logits(a, head), _plain_logits(b, head))
        found = [[stats.kl, stats.reverse_kl, stats.js, stats.tv] for stats in (ours, of_plain)]
        return Errors(_worst(found[0], expected), _worst(found[1], expected), EPSILON[cell.dtype])

    return compare


def _linear(cell: Cell) -> Callable[[], Errors]:
    rng, shape, depth = _setting(cell)
    w = _weight(rng, cell, shape.vocab, depth)
    x = oracle.random_array(rng, shape.layers * shape.tokens, depth, dtype=TYPES[cell.dtype])
    bias = oracle.random_array(rng, shape.vocab)
    product = metal_matmul.linear if cell.mode == "dense" else metal_matmul.tile_linear  # which `linear` does not choose for a single row
    ours = product(x, w, bias, 0.5, rounded=cell.dtype == "float16")

    def compare() -> Errors:
        expected = (oracle.product(x, w) + oracle.wide(bias)) * 0.5
        plain = (_plain_product(x, w) + bias.astype(x.dtype)) * 0.5
        return Errors(_worst([ours], [expected]), _worst([plain], [expected]), EPSILON[cell.dtype])

    return compare


def _kl(cell: Cell) -> Callable[[], Errors]:
    rng, shape, depth = _setting(cell)
    head = _head(rng, cell, shape, depth)
    n_model = oracle.random_array(rng, shape.tokens, depth)
    n = n_model[None] + oracle.random_array(rng, shape.layers, shape.tokens, depth, scale=0.3)
    with use_precision(PRECISION[cell.dtype]):
        ours = list(lens_kl(n, lens_target(n_model, head), head))
    dtype = TYPES[cell.dtype]

    def loss(n: mx.array) -> mx.array:
        def log_probabilities(rows: mx.array) -> mx.array:
            z = _plain_logits(rows.astype(dtype), head)
            return z - mx.logsumexp(z, axis=-1, keepdims=True)

        log_p = log_probabilities(n_model)
        return mx.sum(mx.exp(log_p) * (log_p - log_probabilities(n)), axis=-1)

    def compare() -> Errors:
        expected = list(oracle.lens_kl(n, n_model, head))
        plain = [loss(n), mx.grad(lambda n: mx.sum(loss(n)))(n)]
        return Errors(_worst(ours, expected), _worst(plain, expected), EPSILON[cell.dtype])

    return compare


def _translate(cell: Cell) -> Callable[[], Errors]:
    rng, shape, _ = _setting(cell)
    depth, dtype = {"tiles": 64, "primes": 61, "one": 1, "few": 16}[cell.shape], TYPES[cell.dtype]
    kind = cell.kernel.removeprefix("translate_norm_")
    h = oracle.random_array(rng, shape.layers * shape.tokens, depth)
    w = (mx.eye(depth) + oracle.random_array(rng, depth, depth, scale=0.1)).astype(dtype)
    b, gain, shift = (oracle.random_array(rng, depth, dtype=t) for t in (dtype, mx.float32, mx.float32))
    eps = 1e-5
    norm = Norm(lambda y: y, kind, gain, shift if kind == "layer" else None, eps)
    cotangent = oracle.random_array(rng, *h.shape)
    outputs, gradients = mx.vjp(lambda h, w, b: translate_norm(h, w, b, norm), [h, w, b], [cotangent])

    def plain(h: mx.array, w: mx.array, b: mx.array) -> mx.array:
        y = (h.astype(dtype) @ w.T + b).astype(mx.float32)
        return mx.fast.rms_norm(y, gain, eps) if kind == "rms" else mx.fast.layer_norm(y, gain, shift, eps)

    def compare() -> Errors:
        y = oracle.wide(h) @ oracle.wide(w).T + oracle.wide(b)
        center = y.mean(-1, keepdims=True) if kind == "layer" else 0.0
        r = 1 / np.sqrt(((y - center) ** 2).mean(-1, keepdims=True) + eps)
        x = (y - center) * r
        v = oracle.wide(cotangent) * oracle.wide(gain)
        dy = r * (v - (v.mean(-1, keepdims=True) if kind == "layer" else 0.0) - x * (x * v).mean(-1, keepdims=True))
        expected = [x * oracle.wide(gain) + (oracle.wide(shift) if kind == "layer" else 0.0), dy @ oracle.wide(w), dy.T @ oracle.wide(h), dy.sum(0)]

        of_plain, plain_gradients = mx.vjp(plain, [h, w, b], [cotangent])
        rounding = {"float32": 0.0, "float16": 5e-4, "bfloat16": 4e-3}[cell.dtype]  # rounding of the gradients, which have their parameters' type
        return Errors(_worst([*outputs, *gradients], expected), _worst([*of_plain, *plain_gradients], expected), 2e-5 + rounding)

    return compare


_RUN: dict[str, Callable[[Cell], Callable[[], Errors]]] = {
    "lens_stats": _stats,
    "lens_stats_vector": _stats,
    "lens_compare": _compare,
    "linear": _linear,
    "lens_kl": _kl,
}


def launch(cell: Cell) -> Callable[[], Errors]:
    """Compute the cell on the backend in use. The function that is returned compares the results and returns their errors."""
    return _RUN.get(cell.kernel.removesuffix(WITH_OFFSET), _translate)(cell)


def run(cell: Cell) -> Errors:
    """Compute the cell on the backend in use and return its errors."""
    return launch(cell)()
