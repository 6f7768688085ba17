"""How long a run takes on this machine: its counted work, at the speed that a probe of about a second measures here.

The probe runs the operations of a run at the model's shapes: the head with its gradient on a few rows and a part of the vocabulary, a matrix of the
model's blocks in the model's format, and a product in float32, as translators, warm start and Muon have them. No weights are read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from metalens.models.facts import ModelFacts
from metalens.ops import Head, Weight, lens_kl, lens_target, linear
from metalens.ops.backends import native, precision
from metalens.training.config import TrainingConfig
from metalens.training.guard import check_every
from metalens.training.vocabulary import sample_size
from metalens.training.work import regression_flops, translator_flops, update_flops
from metalens.utils.errors import InvalidValueError

PROBE_SECONDS = 0.2  # of each of the four operations, after a first call
PROBE_LAYERS, PROBE_TOKENS = 8, 32  # rows of the head's probe
PROBE_HEAD = 1 << 23  # elements of the head's probe: a part of a large vocabulary is enough, since the time is proportional to it
# Standard deviation of the probe's logits. With much larger ones nearly all probabilities are subnormal numbers, which take a CPU twice as long.
PROBE_SPREAD = 2.0
PASS_ROWS = 512  # tokens of a forward pass

# A forward pass beside its products: attention, norms, activations. Products take 0.86 of a pass of SmolLM2-135M (one sequence of 128 tokens, one
# thread, AVX-512).
FORWARD_OVERHEAD = 1.2
# The sums of the warm start beside their products: 1.3 and 1.25 times as long there.
SUMS_OVERHEAD = 1.3
# Start of Python and MLX, reading the model and its tokenizer, and the check of the head: 4 s for SmolLM2 (98 MB, tokenizer of 3.5 MB) and 10 s for
# Gemma 3 270M (266 MB, 33 MB).
START_SECONDS, TOKENIZER_BYTES_PER_SECOND, WEIGHT_BYTES_PER_SECOND = 3.0, 6e6, 2e8
# Times D^3: the solution of a layer, in NumPy's float64, as work at the speed of `product`. 0.04 to 0.1 s for D = 577 beside 86 GFLOP/s; more where
# other work disturbs NumPy's threads.
SOLVE_FLOPS = 80


@dataclass(frozen=True)
class Speed:
    """The speed of this machine at a model's shapes.

    Attributes:
        target: seconds of the model's own row of the head, for each entry of the vocabulary.
        kl: seconds of a lens's row of the head and its gradient, for each entry of the vocabulary.
        forward: multiplications and additions per second of the model's matrices.
        product: multiplications and additions per second of float32 matrices.
    """

    target: float
    kl: float
    forward: float
    product: float


@dataclass(frozen=True)
class Duration:
    """The seconds of a run.

    Attributes:
        start: loading the model and its tokenizer.
        warm_start: closed-form solution.
        steps: all steps, and the checks of the guard between them.
    """

    start: float
    warm_start: float
    steps: float

    @property
    def total(self) -> float:
        """Return the seconds of the whole run."""
        return self.start + self.warm_start + self.steps


def measured_speed(facts: ModelFacts) -> Speed:
    """Measure this machine's speed at a model's shapes. The answer is kept for the rest of the process."""
    d = facts.dimensions
    formats = (d.bits, d.group_size, facts.block_bits or d.bits, facts.block_group_size or d.group_size)
    setting = (str(mx.default_device()), precision(), native() is not None)
    return _measured(d.hidden_size, d.vocab_size, facts.intermediate_size, *formats, facts.activation_bytes, setting)


def seconds_of(
    facts: ModelFacts,
    config: TrainingConfig,
    speed: Speed,
    *,
    layers: int | None = None,
    passes: int = 1,
    processes: int = 1,
    share: float = 1.0,
) -> Duration:
    """Estimate the duration of a run.

    Args:
        facts: facts of the model.
        config: the settings.
        speed: speed of the machine.
        layers: layers that a process trains. None = those of the settings.
        passes: how often a process reads the text.
        processes: processes that divide the tokens of a step.
        share: part of the tokens that count in the loss. The model reads the others too.
    """
    d, hidden_size = facts.dimensions, facts.dimensions.hidden_size
    if layers is None:
        layers = d.num_layers if config.layers is None else len(config.layers)
    forward = FORWARD_OVERHEAD * 2 * d.block_params / speed.forward / share
    warm_token = passes * forward + SUMS_OVERHEAD * layers * regression_flops(hidden_size) / speed.product
    solution = layers * SOLVE_FLOPS * hidden_size**3 / speed.product if config.warm_start_tokens else 0.0
    sample = sample_size(config.vocabulary, d.vocab_size)
    ids = sample or d.vocab_size
    model_rows = ids * (speed.target + speed.kl / 2)  # the second time, without a gradient, beside the lens's rows
    if sample is not None:
        model_rows += d.vocab_size * speed.target  # the ids that the model expects
    token = passes * (forward + model_rows) + layers * (ids * speed.kl + translator_flops(hidden_size, config) / speed.product)
    update = layers * update_flops(hidden_size, config) / speed.product
    held_back = config.held_back_tokens
    checked = held_back * (1 + config.num_steps // check_every(config, held_back)) if held_back else 0
    check_token = passes * (forward + d.vocab_size * speed.target) + layers * d.vocab_size * speed.kl / 2
    return Duration(
        start=START_SECONDS + facts.tokenizer_bytes / TOKENIZER_BYTES_PER_SECOND + facts.weight_bytes / WEIGHT_BYTES_PER_SECOND,
        warm_start=config.warm_start_tokens * warm_token / processes + solution,
        steps=config.num_steps * (config.step_tokens * token / processes + update) + checked * check_token / processes,
    )


def budget_in(seconds: float, settings: Callable[[int], TrainingConfig], duration: Callable[[TrainingConfig], Duration]) -> int:
    """Return the largest budget in tokens whose run fits into a time, to two digits, and at least a sequence.

    Args:
        seconds: the time.
        settings: function of a budget that returns the settings of the run.
        duration: function of settings that returns the duration.
    """
    least = _smallest_budget(settings)
    most = least
    while most < 1 << 40 and duration(settings(most)).total <= seconds:
        least, most = most, 2 * most
    while most - least > max(1, least // 100):
        middle = (least + most) // 2
        least, most = (middle, most) if duration(settings(middle)).total <= seconds else (least, middle)
    unit = 10 ** max(0, len(str(least)) - 2)
    return int(least // unit * unit)


def _smallest_budget(settings: Callable[[int], TrainingConfig]) -> int:
    """Return the smallest of 128, 256, 512, ... tokens that holds a sequence of the run.

    Raises:
        InvalidValueError: if the settings are wrong for every budget.
    """
    budget = 128
    while True:
        try:
            settings(budget)
        except InvalidValueError:
            if budget >= 1 << 20:
                raise
            budget *= 2
        else:
            return budget


# ------------------------------------------------------------------ the probe


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
    vocabulary = min(vocab_size, max(1024, PROBE_HEAD // hidden_size))
    head = Head(_weight(vocabulary, hidden_size, bits, group_size, activation_bytes))
    rows = mx.random.normal((PROBE_LAYERS, PROBE_TOKENS, hidden_size), key=random) * (PROBE_SPREAD / math.sqrt(hidden_size))
    target = lens_target(rows[0], head)
    wide = min(intermediate_size, max(256, PROBE_HEAD // hidden_size))
    block = _weight(wide, hidden_size, block_bits, block_group_size, activation_bytes)
    x = mx.random.normal((PASS_ROWS, hidden_size), key=random)
    narrow = x.astype(mx.float32 if activation_bytes == 4 else mx.float16)
    square = Weight(mx.random.normal((hidden_size, hidden_size), key=random))
    mx.eval(rows, vars(target), x, narrow, square.values)
    lens_rows = PROBE_LAYERS * PROBE_TOKENS + PROBE_TOKENS / 2  # the model's rows have no gradient: half the work
    return Speed(
        target=_seconds(lambda: [a for a in vars(lens_target(rows[0], head)).values() if a is not None]) / PROBE_TOKENS / vocabulary,
        kl=_seconds(lambda: lens_kl(rows, target, head)) / lens_rows / vocabulary,
        forward=2 * PASS_ROWS * hidden_size * wide / _seconds(lambda: linear(narrow, block)),
        product=2 * PASS_ROWS * hidden_size**2 / _seconds(lambda: linear(x, square)),
    )


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
    """Return the mean time of an operation."""
    mx.eval(compute())
    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < PROBE_SECONDS:
        mx.eval(compute())
        count += 1
    return (time.perf_counter() - start) / count
