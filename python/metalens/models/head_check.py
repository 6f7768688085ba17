"""Explain arrays of a model by each other: which factors and softcap lead from one to the next, and whether nothing else happens in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalens.models.probe import ModuleCall
from metalens.utils.arrays import to_float

# Largest difference between the logits of an Unembed and the model's own, relative to the spread of the own logits. float32 leaves room for
# sums in another order. 16-bit activations carry 8 or 11 bits from the norm on; `first_difference` finds what this bound is too wide for.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.05
# Added to the bounds, for logits without any spread.
ABSOLUTE_TOLERANCE = 1e-5

# Relative rounding error of one number.
ROUNDING = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-23}
# softcap * tanh(scale * x / softcap) rounds after each of its four operations.
ROUNDINGS = 4
# Added to the bounds of one step, because near 0 a relative bound allows nothing.
STEP_TOLERANCE = 1e-6
# Rounding goes up as often as down, so the mean error is much smaller than one rounding. A mean error above this part of a rounding is a factor.
MEAN_ROUNDING = 1 / 8
# Keeps the mean error of an array of zeros finite.
TINY = 1e-30

# Largest difference, relative to the largest element, for which an error message calls one array a multiple of another.
MULTIPLE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class HeadTransform:
    """What a model does beside its head: logits = softcap(output_scale * head(input_scale * normed)).

    Attributes:
        input_scale: the factor of the head's input.
        output_scale: the factor of the head's output.
        softcap: c of c * tanh(z / c). None = no softcap.
    """

    input_scale: float = 1.0
    output_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Step:
    """A claim about a model: `after` is softcap(scale * before).

    Attributes:
        before, after: arrays of one forward pass.
        scale: the factor.
        softcap: c of c * tanh(z / c). None = no softcap.
        denial: the words of an error message for a claim that is wrong.
    """

    before: mx.array
    after: mx.array
    denial: str
    scale: float = 1.0
    softcap: float | None = None


def infer_transform(
    normed: mx.array, head: ModuleCall, logits: mx.array, factors: Mapping[str, float], softcaps: Mapping[str, float]
) -> HeadTransform:
    """Find which numbers of the configuration the model uses beside its head.

    Args:
        normed: the output of the final norm [B, T, D].
        head: the call of the head.
        logits: the model's own logits [B, T, V].
        factors: factors that the configuration offers, by name.
        softcaps: softcaps that the configuration offers, by name.

    Returns:
        the numbers that come nearest; `first_difference` tells whether they are right.
    """
    scales = [1.0, *factors.values()]
    input_scale, output_scale, softcap = 1.0, 1.0, None
    if not _equal(head.input, normed):
        input_scale = _nearest({scale: normed.astype(mx.float32) * scale for scale in scales}, head.input)
    output = head.output[..., : logits.shape[-1]].astype(mx.float32)
    if not _equal(logits, output):
        ways = [(scale, cap) for cap in (None, *softcaps.values()) for scale in scales]
        output_scale, softcap = _nearest({way: _transformed(output, *way) for way in ways}, logits)
    return HeadTransform(input_scale, output_scale, softcap)


def first_difference(steps: Sequence[Step]) -> str:
    """Return a sentence on the first step that is not as claimed; "" if all are."""
    wrong = next((step for step in steps if not _holds(step)), None)
    return "" if wrong is None else f"The first difference: {wrong.denial}{_ratio(wrong.after, wrong.before)}."


def logits_difference(found: mx.array, own: mx.array, exact: bool) -> tuple[float, float, bool]:
    """Compare logits with the model's own, both [..., V] float32.

    Args:
        found: the logits to compare.
        own: the model's own logits.
        exact: whether the model computes in float32, and not in 16 bits.

    Returns:
        (largest difference, spread: the largest distance of an own logit from the mean of its token's, whether the difference is only rounding)
    """
    difference = _largest(mx.where(found == own, 0.0, found - own))  # a head may forbid tokens: -inf on both sides is no difference
    allowed = mx.isfinite(own)
    mean = mx.sum(mx.where(allowed, own, 0.0), axis=-1, keepdims=True) / mx.sum(allowed, axis=-1, keepdims=True)
    spread = _largest(mx.where(allowed, own - mean, 0.0))
    tolerance = (FLOAT32_TOLERANCE if exact else HALF_TOLERANCE) * spread + ABSOLUTE_TOLERANCE
    return difference, spread, difference <= tolerance


def _holds(step: Step) -> bool:
    """Return whether a claim is right: to the last bit where nothing is computed, else within rounding and without a bias of the errors."""
    if step.scale == 1.0 and step.softcap is None:
        return _equal(step.before, step.after)
    if step.before.shape != step.after.shape:
        return False
    found = step.after.astype(mx.float32)
    rounding = max(ROUNDING.get(dtype, 0.0) for dtype in (step.before.dtype, step.after.dtype))
    # A model that multiplies by 1/6 rounds 1/6 to its own type; a model that divides by 6 does not.
    return any(_within_rounding(found, operand, step, rounding) for operand in (step.before, step.before.astype(mx.float32)))


def _within_rounding(found: mx.array, operand: mx.array, step: Step, rounding: float) -> bool:
    expected = _transformed(operand, step.scale, step.softcap).astype(mx.float32)
    error = found - expected
    excess = to_float(mx.max(mx.abs(error) - ROUNDINGS * rounding * mx.abs(expected)))
    mean = abs(to_float(mx.sum(error * mx.sign(expected)))) / (to_float(mx.sum(mx.abs(expected))) + TINY)
    return excess <= STEP_TOLERANCE and mean <= rounding * MEAN_ROUNDING + STEP_TOLERANCE


def _equal(a: mx.array, b: mx.array) -> bool:
    """Return whether two arrays have the same values, whatever their types."""
    return a.shape == b.shape and bool(to_float(mx.array_equal(a.astype(mx.float32), b.astype(mx.float32), equal_nan=True)))


def _largest(x: mx.array) -> float:
    return to_float(mx.max(mx.abs(x)))


def _nearest(candidates: dict[Any, mx.array], wanted: mx.array) -> Any:
    """Return the key of the array that is nearest to `wanted`, the first of several that are as near."""
    differences = {key: _largest(value - wanted.astype(mx.float32)) for key, value in candidates.items()}
    return min(differences, key=lambda key: differences[key])


def _ratio(a: mx.array, b: mx.array) -> str:
    """Return the end of a sentence that says `a` is not `b`: their shapes, or the factor between them, or nothing."""
    if a.shape != b.shape:
        return f", which is {b.shape} and not {a.shape}"
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    factor = to_float(mx.sum(a * b) / mx.sum(b * b))
    return f", but {factor:.6g} times that" if _largest(a - factor * b) <= MULTIPLE_TOLERANCE * _largest(a) else ""


def _transformed(z: mx.array, scale: float, softcap: float | None) -> mx.array:
    z = z * scale
    return z if softcap is None else softcap * mx.tanh(z / softcap)
