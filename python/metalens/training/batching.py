"""From sequences to streams: short sequences, and short steps, go through the model together.

A forward pass over few tokens uses the kernels badly. Steps of fewer than PASS_TOKENS are therefore captured several at a time, always the same ones
together: steps 0 to n - 1, n to 2 n - 1, and so on. A run that was stopped between them captures its group again, and so goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.training.config import TrainingConfig
from metalens.training.data import Sampler, Step, batches
from metalens.utils.errors import InvalidValueError

# So many tokens go through the model together: enough rows for the kernels to pay, and less memory than one long sequence.
PASS_TOKENS = 512


def steps_together(config: TrainingConfig) -> int:
    """How many steps are captured together."""
    return max(1, PASS_TOKENS // config.step_tokens)


@dataclass(frozen=True)
class StepGroup:
    """Steps that are captured together.

    Attributes:
        first: number of the first one.
        position: the sampler's state before it.
        steps: in order.
    """

    first: int
    position: dict[str, Any]
    steps: list[Step]

    def resumable(self, i: int) -> dict[str, Any]:
        """The sampler's state from which a run goes on after the group's step i: only after the last one the group is behind it."""
        return self.steps[i].state if i == len(self.steps) - 1 else self.position


def step_groups(sampler: Sampler, config: TrainingConfig, done: int, rank: int, world: int) -> Iterator[StepGroup]:
    """The groups of a run, from the one on in which `done` steps are behind it; the sampler is where `resumable` says.

    Args:
        sampler: where the sequences come from.
        config: the settings.
        done: steps.
        rank: which share of every step, from 0.
        world: number of shares.
    """
    together = steps_together(config)
    first = done if done == config.num_steps else done - done % together
    while first < config.num_steps:
        position, count = sampler.state(), min(together, config.num_steps - first)
        yield StepGroup(first, position, [sampler.take_step(config.step_tokens, rank, world) for _ in range(count)])
        first += count


class Capture:
    """The model's forward passes.

    Args:
        source: the model's residual streams.
        vocabulary: token ids that the model knows.
    """

    def __init__(self, source: ResidualCapture, vocabulary: int) -> None:
        self.source, self.vocabulary = source, vocabulary

    def streams(self, sequences: Sequence[np.ndarray]) -> Iterator[HiddenStates]:
        """Of sequences [t], as many in a pass as PASS_TOKENS allows. A pass is computed when it is asked for.

        Raises:
            ValueError: if the text has ids that the model does not know.
        """
        for _, stream in self._passes(sequences):
            yield stream

    def of_steps(self, steps: Sequence[Step]) -> Iterator[Iterable[HiddenStates]]:
        """The streams of each step. One step's passes are computed one after another, several steps' at once.

        Raises:
            ValueError: if the text has ids that the model does not know.
        """
        if len(steps) == 1:
            yield self.streams(steps[0].sequences)
            return
        owners = [i for i, step in enumerate(steps) for _ in step.sequences]
        found: list[list[HiddenStates]] = [[] for _ in steps]
        for members, stream in self._passes([sequence for step in steps for sequence in step.sequences]):
            for owner in dict.fromkeys(owners[i] for i in members):
                places = [place for place, i in enumerate(members) if owners[i] == owner]  # side by side: members ascend
                found[owner].append(stream.of_sequences(slice(places[0], places[-1] + 1)))
        yield from found

    def _passes(self, sequences: Sequence[np.ndarray]) -> Iterator[tuple[list[int], HiddenStates]]:
        """Which sequences, and their streams."""
        for members in batches([sequence.size for sequence in sequences], PASS_TOKENS):
            batch = np.stack([sequences[i] for i in members])
            if batch.size and not 0 <= batch.min() <= batch.max() < self.vocabulary:  # MLX would read other memory
                raise InvalidValueError(
                    f"The text has token ids from {batch.min()} to {batch.max()}; the model knows 0 to {self.vocabulary - 1}. "
                    "Tokenize it with the model's own tokenizer."
                )
            yield members, self.source.capture(mx.array(batch))
