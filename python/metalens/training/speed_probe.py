"""The speed of this machine, measured within about two seconds: the operations of a run at the model's shapes. No weights are read.

A large vocabulary and a wide model are measured on a part: times are proportional to the vocabulary, and work per second depends little on the width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.models.facts import ModelFacts
from metalens.ops import Head, Weight, attention, lens_kl, lens_stats, lens_target, linear, rms_norm, swiglu, use_precision
from metalens.ops.backends import given_precision, native
from metalens.training.optimizer import LensMuon
from metalens.training.polar import HALVES, polynomials
from metalens.training.speed import Speed
from metalens.training.step import step_operands
from metalens.training.vocabulary import LEAST_SAMPLED, PIECE
from metalens.training.warm_start import Regression
from metalens.training.work import regression_flops
from metalens.utils.cholesky import solve_positive_definite

CLOCK = time.perf_counter
SECONDS = 0.12  # of each operation, after a first call
LAYERS, TOKENS = 8, 32  # rows of a full head
HEAD = 1 << 22  # elements of the head, and of a matrix of the model
WIDEST = 512  # of a matrix whose work grows with the third power of the width
# Standard deviation of the logits. With much larger ones nearly all probabilities are subnormal numbers, which take a CPU twice as long.
SPREAD = 2.0
PASS_ROWS, SEQUENCE, HEAD_WIDTH = 512, 128, 64  # tokens of a forward pass and of its sequences; width of a head of its attention
NUMBERS = 100_000  # that Python spells


def measured_speed(facts: ModelFacts) -> Speed:
    """Measure this machine's speed at a model's shapes. The answer is kept for the rest of the process."""
    d = facts.dimensions
    formats = (d.bits, d.group_size, facts.block_bits or d.bits, facts.block_group_size or d.group_size)
    setting = (str(mx.default_device()), given_precision(), step_operands(sampled=True), native() is not None)
    return _measured(d.hidden_size, d.vocab_size, facts.intermediate_size, *formats, facts.activation_bytes, setting)


@cache
def _measured(
    hidden_size: int,
    vocab_size: int,
    intermediate_size: int,
    bits: int,
    group_size: int,
    block_bits: int,
    block_group_size: int,
    activation_bytes: int,
    setting: Any,
) -> Speed:
    random = mx.random.key(0)  # MLX's global state stays as it is
    vocabulary = min(vocab_size, max(1024, HEAD // hidden_size))
    head = Head(_weight(vocabulary, hidden_size, bits, group_size, activation_bytes))
    sample = min(vocabulary, LEAST_SAMPLED)
    sampled = head.sampled(mx.arange(sample), mx.zeros((sample,)))
    rows = mx.random.normal((LAYERS, PIECE, hidden_size), key=random) * (SPREAD / math.sqrt(hidden_size))
    few = mx.contiguous(rows[:, :TOKENS])
    target, sampled_target = lens_target(few[0], head), lens_target(rows[0], sampled)
    wide = min(intermediate_size, max(256, HEAD // hidden_size))
    block = _weight(wide, hidden_size, block_bits, block_group_size, activation_bytes)
    x = mx.random.normal((PASS_ROWS, hidden_size), key=random)
    narrow = x.astype(mx.float32 if activation_bytes == 4 else mx.float16)
    square, regression = Weight(mx.random.normal((hidden_size, hidden_size), key=random)), Regression(hidden_size)
    mx.eval(few, vars(target), vars(sampled_target), x, narrow, square.values)

    def of_samples(compute: Callable[[], Any]) -> Any:
        with use_precision(step_operands(sampled=True)):
            return compute()

    def of_block() -> Any:
        return linear(narrow, block)

    def kl_of_samples() -> Any:
        return of_samples(lambda: lens_kl(rows, sampled_target, sampled))

    return Speed(
        target=_seconds(lambda: vars(lens_stats(rows[:1], head, 1))) / PIECE / vocabulary,
        kl=_seconds(lambda: lens_kl(few, target, head)) / few[..., 0].size / vocabulary,
        sampled_kl=_seconds(kl_of_samples) / rows[..., 0].size / sample,
        check=_seconds(lambda: vars(lens_stats(few, head, 1, few[0]))) / few[..., 0].size / vocabulary,
        forward=2 * PASS_ROWS * hidden_size * wide / _seconds(of_block),
        sampled_forward=2 * PASS_ROWS * hidden_size * wide / _seconds(lambda: of_samples(of_block)),
        beside=_seconds(_beside(narrow, intermediate_size)) / PASS_ROWS,
        product=2 * PASS_ROWS * hidden_size**2 / _seconds(lambda: linear(x, square)),
        sums=PASS_ROWS * regression_flops(hidden_size) / _seconds(partial(regression.add, x, x)),
        solution=_solution(min(hidden_size, WIDEST)),
        iteration=_iteration(min(hidden_size, WIDEST)),
        python=_seconds(_spell),
    )


def _beside(x: mx.array, intermediate_size: int) -> Callable[[], Any]:
    """Return what a layer computes for rows [T, D] beside its matrices."""
    tokens, width = x.shape
    heads = max(1, width // HEAD_WIDTH)
    q = mx.zeros((tokens // SEQUENCE, heads, SEQUENCE, HEAD_WIDTH), x.dtype)
    gate, gain = mx.zeros((tokens, intermediate_size), x.dtype), mx.ones((width,), x.dtype)
    mx.eval(q, gate, gain)

    def compute() -> list[mx.array]:
        norms = [rms_norm(x, gain, 1e-5), rms_norm(x + x, gain, 1e-5)]
        return [*norms, attention(q, q, q, scale=1.0, mask="causal"), swiglu(gate, gate), x + x]

    return compute


def _solution(size: int) -> float:
    """Return D^3 per second of the solution of a layer of the warm start."""
    inputs = np.random.Generator(np.random.PCG64(0)).standard_normal((size, size))
    matrix = inputs @ inputs.T + size * np.eye(size)
    return size**3 / _seconds(lambda: solve_positive_definite(matrix, inputs))


def _iteration(size: int) -> float:
    """Return multiplications and additions per second of Muon's iterations, within the direction of a step."""
    gradient, momentum = mx.random.normal((2, size, size), key=mx.random.key(2))
    scale = mx.ones((size,))
    mx.eval(gradient, momentum, scale)
    muon = LensMuon(learning_rate=0.1)
    halves = HALVES * len(polynomials(size)[0])
    return halves * size**3 / _seconds(lambda: vars(muon.direction(gradient, {"v": momentum}, scale, scale)))


def _spell() -> None:
    """Do a fixed piece of work of Python. It makes no containers, whose garbage collection would also go through all that the process holds."""
    sum(len(str(i)) for i in range(NUMBERS))


def _weight(rows: int, columns: int, bits: int, group_size: int, activation_bytes: int) -> Weight:
    """Return a random matrix in a format of the model. A format that MLX does not have at this width is taken as not quantized."""
    values = mx.random.normal((rows, columns), key=mx.random.key(1)).astype(mx.float32 if activation_bytes == 4 else mx.float16)
    if group_size and bits < 16 and columns % group_size == 0:
        try:
            quantized = mx.quantize(values, group_size, bits)
        except ValueError:
            return Weight(values)
        mx.eval(quantized)
        return Weight(*quantized, group_size, bits)
    mx.eval(values)
    return Weight(values)


def _seconds(compute: Callable[[], Any]) -> float:
    """Return the mean time of an operation. The arrays that it returns are evaluated."""
    mx.eval(compute())
    start, count = CLOCK(), 0
    while not count or CLOCK() - start < SECONDS:
        mx.eval(compute())
        count += 1
    return (CLOCK() - start) / count
