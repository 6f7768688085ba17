"""The kernels of metal/, each as a function from its specialization to a descriptor."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from metalens.ops.metal import constants
from metalens.ops.metal.formats import ELEMENTS, Format
from metalens.ops.metal.kernel import Argument, Kernel

# The factor of the gradient of the logits, so that half holds it: |q - p| <= 1, and 2^-39 is still a number.
GRAD_SCALE = {mx.float32: 1.0, mx.float16: 2.0**15}


def operand(rounded: bool) -> str:
    """Return the type in which rows and weights are multiplied: float, which holds 16-bit values exactly, or half if they may be rounded."""
    return "half" if rounded else "float"


def _tile(rows: int, element: str) -> str:
    return f"metalens::Tile<{rows}, {element}>"


def _of_tile(f: Format, rows: int, rounded: bool, tensor: bool, header: str) -> tuple[str, str, str]:
    """Return a product's tile, its label, and the header of a kernel that `header` defines for any tile.

    Args:
        f: the format of the matrix.
        rows: rows of the tile.
        rounded: whether operands may be rounded to half.
        tensor: whether it multiplies by tensor operations (metal/tensor_tile.h).
        header: the kernel's own header.
    """
    if not tensor:
        return _tile(rows, operand(rounded)), f"m{rows}_{operand(rounded)}", header
    halves = 1 if rounded else 2  # of an operand
    return f"metalens::TensorTile<{rows}, {halves}, {f.type}>", f"m{rows}_tensor{halves}", "tensor_kernels.h"


def _buffers(**elements: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, element) for name, element in elements.items())


def _weight(f: Format) -> dict[str, str]:
    return {"values": f.values, "scales": f.scales, "biases": f.biases}


_STATES = {"states": "float", "above": "int", "top_logits": "float", "top_ids": "int"}


def _stats_inputs(element: str, f: Format, **of_labels: str) -> tuple[Argument, ...]:
    return _buffers(n=element, n_model=element, **_weight(f), head_bias="float", head_offset="float", **of_labels, problem="int")


@cache
def lens_label_logits(x: mx.Dtype, f: Format, rows: int, rounded: bool, tensor: bool = False) -> Kernel:
    """Describe the logits of the labels of blocks of `rows` rows; see metal/lens_label_logits.h."""
    element = ELEMENTS[x]
    tile, label, header = _of_tile(f, rows, rounded, tensor, "lens_label_logits.h")
    return Kernel(
        "lens_label_logits",
        header,
        (element, f.type, tile),
        f"{element}_{f.label}_{label}",
        _stats_inputs(element, f, labels="int"),
        _buffers(label_logits="float"),
        shared=f"{tile}::FLOATS",
    )


@cache
def lens_label_logits_vector(x: mx.Dtype, f: Format) -> Kernel:
    """Describe the logits of the labels of at most eight rows; see metal/lens_label_logits.h."""
    element = ELEMENTS[x]
    return Kernel(
        "lens_label_logits_vector",
        "lens_label_logits.h",
        (element, f.type),
        f"{element}_{f.label}",
        _stats_inputs(element, f, labels="int"),
        _buffers(label_logits="float"),
        shared="metalens::VECTOR_X",
        threads=constants.VECTOR_THREADS,
    )


@cache
def lens_stats(x: mx.Dtype, f: Format, rows: int, rounded: bool, tensor: bool = False) -> Kernel:
    """Describe the statistics of blocks of `rows` rows; see metal/lens_stats.h."""
    element = ELEMENTS[x]
    tile, label, header = _of_tile(f, rows, rounded, tensor, "lens_stats.h")
    return Kernel(
        "lens_stats",
        header,
        (element, f.type, tile),
        f"{element}_{f.label}_{label}",
        _stats_inputs(element, f, label_logits="float"),
        _buffers(**_STATES),
        shared=f"{tile}::FLOATS",
        groups=True,
    )


@cache
def lens_stats_vector(x: mx.Dtype, f: Format) -> Kernel:
    """Describe the statistics of at most eight rows; see metal/lens_stats_vector.h."""
    element = ELEMENTS[x]
    return Kernel(
        "lens_stats_vector",
        "lens_stats_vector.h",
        (element, f.type),
        f"{element}_{f.label}",
        _stats_inputs(element, f, label_logits="float"),
        _buffers(**_STATES),
        shared="metalens::VECTOR_FLOATS",
        groups=True,
        threads=constants.VECTOR_THREADS,
    )


@cache
def lens_stats_merge() -> Kernel:
    """Describe the kernel that merges the splits of lens_stats and lens_stats_vector."""
    return Kernel(
        "lens_stats_merge",
        "lens_stats_merge.h",
        (),
        "",
        _buffers(**_STATES, label_logits="float", labels="int", problem="int"),
        _buffers(
            lse="float",
            entropy="float",
            max_probability="float",
            best_ids="int",
            best_logits="float",
            kl="float",
            agrees="bool",
            reverse_kl="float",
            nll="float",
            rank="int",
        ),
    )


@cache
def linear(x: mx.Dtype, f: Format, rows: int, rounded: bool, tensor: bool = False) -> Kernel:
    """Describe scale * (x W^T + bias); see metal/linear.h."""
    element = ELEMENTS[x]
    tile, label, header = _of_tile(f, rows, rounded, tensor, "linear.h")
    return Kernel(
        "linear",
        header,
        (element, f.type, tile),
        f"{element}_{f.label}_{label}",
        _buffers(x=element, **_weight(f), bias="float", problem="int"),
        _buffers(y="float"),
        shared=f"{tile}::FLOATS",
    )


@cache
def lens_softmax_grad(gradient: mx.Dtype) -> Kernel:
    """Describe the step from logits to q - p; see metal/lens_softmax_grad.h."""
    element = ELEMENTS[gradient]
    return Kernel(
        "lens_softmax_grad",
        "lens_softmax_grad.h",
        (element,),
        element,
        _buffers(chunk="float", model="float", lse_model="float", offset="float", problem="int"),
        _buffers(gradient=element, tile_absmax="float", row_l1="float", kl="float", lse="float", entropy="float"),
        shared="metalens::ROW_SIMDS",
        threads=constants.ROW_THREADS,
    )


@cache
def lens_compare() -> Kernel:
    """Describe the step from two chunks of logits to what compares them; see metal/lens_compare.h."""
    return Kernel(
        "lens_compare",
        "lens_compare.h",
        (),
        "",
        _buffers(a="float", b="float", offset_a="float", offset_b="float", problem="int"),
        _buffers(kl="float", reverse="float", js="float", tv="float"),
        shared="metalens::ROW_SIMDS",
        threads=constants.ROW_THREADS,
    )


@cache
def lens_backward(gradient: mx.Dtype, f: Format, rows: int) -> Kernel:
    """Describe (q - p) U without its negligible tiles; see metal/lens_backward.h."""
    element, tile = ELEMENTS[gradient], _tile(rows, ELEMENTS[gradient])
    return Kernel(
        "lens_backward",
        "lens_backward.h",
        (element, f.type, tile),
        f"{element}_{f.label}_m{rows}",
        _buffers(g=element, tile_absmax="float", row_l1="float", **_weight(f), problem="int"),
        _buffers(dn="float"),
        shared=f"{tile}::FLOATS",
    )


@cache
def norm_grad() -> Kernel:
    """Describe the gradient through the final norm; see metal/norm_grad.h."""
    return Kernel(
        "norm_grad",
        "norm_grad.h",
        (),
        "",
        _buffers(y="float", gain="float", dn="float", problem="int"),
        _buffers(dy="float", db="float"),
        shared="4 * metalens::NORM_ROWS",
    )
