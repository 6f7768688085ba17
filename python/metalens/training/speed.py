"""How long a run takes on this machine: its counted work, at the speed that `training.speed_probe` measures here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metalens.models.facts import ModelFacts
from metalens.training.config import TrainingConfig
from metalens.training.guard import check_every
from metalens.training.vocabulary import sample_size
from metalens.training.work import iteration_flops, regression_flops, translator_flops, update_flops
from metalens.utils.errors import InvalidValueError

# Start of Python and MLX, reading the model and its tokenizer, and the check of the head, as multiples of `Speed.python`: for every model, for each
# byte of the tokenizer and for each byte of the weights. Fitted to demo, SmolLM2-135M and Gemma 3 270M (python -m benchmarks.planned).
START, START_PER_TOKENIZER_BYTE, START_PER_WEIGHT_BYTE = 465.0, 1.4e-5, 2e-7


@dataclass(frozen=True)
class Speed:
    """The speed of this machine at a model's shapes.

    Attributes:
        target: seconds of the model's own row of the head, for each entry of the vocabulary.
        kl: seconds of a lens's row of the head and its gradient, for each entry of the vocabulary.
        sampled_kl: the same on a sample of the vocabulary.
        check: seconds of a lens's row of the head without a gradient, for each entry of the vocabulary.
        forward: multiplications and additions per second of the model's matrices.
        sampled_forward: the same in steps with a sampled vocabulary, whose operands have 16 bits where the CPU multiplies those faster.
        beside: seconds of a layer of the model beside its matrices, for each token: norms, attention, activations.
        product: multiplications and additions per second of translators.
        sums: those of the sums of the warm start.
        solution: those of its solution, in float64, of which a layer takes D^3.
        iteration: those of Muon's iterations.
        python: seconds of a fixed piece of work of Python.
    """

    target: float
    kl: float
    sampled_kl: float
    check: float
    forward: float
    sampled_forward: float
    beside: float
    product: float
    sums: float
    solution: float
    iteration: float
    python: float


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
        layers = len(config.trained_layers(d.num_layers))
    sample = sample_size(config.vocabulary, d.vocab_size)
    forward, forward_of_steps = (
        (2 * d.block_params / rate + d.num_layers * speed.beside) / share
        for rate in (speed.forward, speed.forward if sample is None else speed.sampled_forward)
    )
    warm_token = passes * forward + layers * regression_flops(hidden_size) / speed.sums
    solution = layers * hidden_size**3 / speed.solution if config.warm_start_tokens else 0.0
    if sample is None:
        head = d.vocab_size * (passes * speed.target + layers * speed.kl)
    else:  # the model's own rows meet all ids once, which says what it expects, and the sample
        head = passes * (d.vocab_size + sample) * speed.target + layers * sample * speed.sampled_kl
    token = passes * forward_of_steps + head + layers * translator_flops(hidden_size, config) / speed.product
    iterations = iteration_flops(hidden_size, config)
    update = layers * (iterations / speed.iteration + (update_flops(hidden_size, config) - iterations) / speed.product)
    held_back = config.held_back_tokens
    checked = held_back * (1 + config.num_steps // check_every(config, held_back)) if held_back else 0
    check_token = passes * forward + layers * d.vocab_size * speed.check
    start = START + START_PER_TOKENIZER_BYTE * facts.tokenizer_bytes + START_PER_WEIGHT_BYTE * facts.weight_bytes
    return Duration(
        start=start * speed.python,
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
