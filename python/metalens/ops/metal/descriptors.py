"""The kernels of metal/, each as a function from what it is specialized for to a descriptor."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from metalens.ops.metal.formats import ELEMENTS, Format
from metalens.ops.metal.kernel import Argument, Kernel
from metalens.ops.metal.tensor import Engine
from metalens.ops.metal.tuning import TILE_DEPTH, TILE_IDS

MERGE_ROWS = 4  # of a threadgroup of lens_stats_merge: one for each simdgroup
NORM_ROWS = 16  # of a threadgroup of norm_grad
GRAD_THREADS = 256  # of a threadgroup of lens_softmax_grad
MAP_WIDTH = 32  # ids that share one entry of lens_softmax_grad's map

# What the gradient of the logits is multiplied with so that half holds it: |q - p| <= 1, and 2^-39 is still a number.
MAGNIFIER = {mx.float32: 1.0, mx.float16: 2.0**15}


def operand(rounded: bool) -> str:
    """What rows and weights are multiplied as: float, which 16-bit values fit into without loss, or half where they may be rounded."""
    return "half" if rounded else "float"


def _tile(rows: int, element: str, engine: Engine) -> str:
    return f"metalens::{engine.value}<{rows}, {TILE_IDS}, {TILE_DEPTH}, {element}>"


def _suffix(engine: Engine) -> str:
    return "_tensor" if engine is Engine.TENSOR else ""


def _buffers(**elements: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, element) for name, element in elements.items())


def _weight(f: Format) -> dict[str, str]:
    return {"values": f.values, "scales": f.scales, "biases": f.biases}


_STATES = {"states": "float", "above": "int", "top_logits": "float", "top_ids": "int"}


@cache
def lens_stats(x: mx.Dtype, f: Format, rows: int, rounded: bool, engine: Engine = Engine.SIMDGROUP) -> Kernel:
    """Statistics of blocks of `rows` rows; see metal/lens_stats.h."""
    element, tile = ELEMENTS[x], _tile(rows, operand(rounded), engine)
    return Kernel(
        "lens_stats",
        "lens_stats.h",
        (element, f.type, tile),
        f"{element}_{f.label}_m{rows}_{operand(rounded)}{_suffix(engine)}",
        _buffers(n=element, n_model=element, **_weight(f), head_bias="float", labels="int", problem="int"),
        _buffers(**_STATES),
        shared=f"{tile}::FLOATS",
        groups=True,
    )


@cache
def lens_stats_few(x: mx.Dtype, f: Format, rows: int) -> Kernel:
    """Statistics of at most eight rows; see metal/lens_stats_few.h."""
    element = ELEMENTS[x]
    return Kernel(
        "lens_stats_few",
        "lens_stats_few.h",
        (element, f.type, str(rows)),
        f"{element}_{f.label}_r{rows}",
        _buffers(n=element, n_model=element, **_weight(f), head_bias="float", labels="int", problem="int"),
        _buffers(**_STATES),
        groups=True,
    )


@cache
def lens_stats_merge() -> Kernel:
    """Adds up the splits of either."""
    return Kernel(
        "lens_stats_merge",
        "lens_stats_merge.h",
        (),
        "",
        _buffers(**_STATES, labels="int", problem="int"),
        _buffers(
            lse="float",
            entropy="float",
            max_probability="float",
            best_ids="int",
            best_logits="float",
            kl="float",
            agrees="bool",
            nll="float",
            rank="int",
        ),
    )


@cache
def linear(x: mx.Dtype, f: Format, rows: int, rounded: bool, out: mx.Dtype, engine: Engine = Engine.SIMDGROUP) -> Kernel:
    """scale * (x W^T + bias); see metal/linear.h."""
    element, tile = ELEMENTS[x], _tile(rows, operand(rounded), engine)
    return Kernel(
        "linear",
        "linear.h",
        (element, f.type, tile, ELEMENTS[out]),
        f"{element}_{f.label}_m{rows}_{operand(rounded)}_{ELEMENTS[out]}{_suffix(engine)}",
        _buffers(x=element, **_weight(f), bias="float", problem="int"),
        _buffers(y=ELEMENTS[out]),
        shared=f"{tile}::FLOATS",
    )


@cache
def lens_softmax_grad(gradient: mx.Dtype) -> Kernel:
    """From logits to q - p; see metal/lens_softmax_grad.h."""
    element = ELEMENTS[gradient]
    return Kernel(
        "lens_softmax_grad",
        "lens_softmax_grad.h",
        (element,),
        element,
        _buffers(chunk="float", model="float", lse_model="float", problem="int"),
        _buffers(gradient=element, largest="float", mass="float", kl="float", lse="float", entropy="float"),
        shared="metalens::GRAD_SIMDS",
        threads=GRAD_THREADS,
    )


@cache
def lens_pullback(gradient: mx.Dtype, f: Format, rows: int, engine: Engine = Engine.SIMDGROUP) -> Kernel:
    """(q - p) U without its negligible tiles; see metal/lens_pullback.h."""
    element, tile = ELEMENTS[gradient], _tile(rows, ELEMENTS[gradient], engine)
    return Kernel(
        "lens_pullback",
        "lens_pullback.h",
        (element, f.type, tile),
        f"{element}_{f.label}_m{rows}{_suffix(engine)}",
        _buffers(g=element, largest="float", mass="float", **_weight(f), problem="int"),
        _buffers(dn="float"),
        shared=f"{tile}::FLOATS",
    )


@cache
def norm_grad() -> Kernel:
    """The way back through the final norm; see metal/norm_grad.h."""
    return Kernel(
        "norm_grad",
        "norm_grad.h",
        (),
        "",
        _buffers(y="float", gain="float", dn="float", problem="int"),
        _buffers(dy="float", db="float"),
        shared="4 * metalens::NORM_ROWS",
    )
