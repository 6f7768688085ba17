"""From sequences to hidden states: short sequences, and short steps, go through the model together.

A forward pass over few tokens uses the kernels badly. Therefore several steps of fewer than PASS_TOKENS tokens share a forward pass, always the same
steps: 0 to n - 1, n to 2 n - 1, and so on. A run that was stopped between them captures its group again, and so goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.models.capture import EmbeddingStreamError, HiddenStates, ResidualCapture
from metalens.models.language_model import DEFAULT_SEQUENCE
from metalens.models.layers import Layer
from metalens.ops import precision, use_precision
from metalens.ops.backends import Precision
from metalens.training.config import TrainingConfig
from metalens.training.data import Sampler, Step, batches
from metalens.utils.errors import InvalidValueError

# Tokens of a forward pass: enough rows for the kernels, and no more memory than one sequence of the default length.
PASS_TOKENS = DEFAULT_SEQUENCE


def steps_together(config: TrainingConfig) -> int:
    """Return the number of steps that share a forward pass."""
    return max(1, PASS_TOKENS // config.step_tokens)


@dataclass(frozen=True)
class StepGroup:
    """Steps that share a forward pass.

    Attributes:
        first: number of the first step.
        position: state of the sampler before it.
        steps: the steps, in order.
    """

    first: int
    position: dict[str, Any]
    steps: list[Step]

    def resumable(self, i: int) -> dict[str, Any]:
        """Return the sampler's state from which a run goes on after step i of the group: the start of the group, unless i is its last step."""
        return self.steps[i].state if i == len(self.steps) - 1 else self.position


def step_groups(sampler: Sampler, config: TrainingConfig, done: int, rank: int, world: int) -> Iterator[StepGroup]:
    """Yield the groups of a run, from the group on that follows or contains step `done`.

    Args:
        sampler: the sampler, in the state that `resumable` gave.
        config: the settings.
        done: number of steps that are done.
        rank: number of this process, from 0.
        world: number of processes that divide the steps.
    """
    together = steps_together(config)
    first = done if done == config.num_steps else done - done % together
    while first < config.num_steps:
        position, count = sampler.state(), min(together, config.num_steps - first)
        yield StepGroup(first, position, [sampler.take_step(config.step_tokens, rank, world) for _ in range(count)])
        first += count


class BatchedCapture:
    """Forward passes of the model over batches of sequences.

    Args:
        source: captures the model's hidden states.
        embedding_rows: number of token ids that the model knows.
        with_embedding: also capture the embedding's output.
    """

    def __init__(self, source: ResidualCapture, embedding_rows: int, *, with_embedding: bool = False) -> None:
        self.source, self.embedding_rows = source, embedding_rows
        self.with_embedding = with_embedding

    def runs_for(self, layers: Sequence[Layer]) -> bool:
        """Tell whether this process runs forward passes: for layers that it trains, or for other processes, with which it shares the model."""
        return bool(layers) or self.source.sharding is not None

    def hidden_states(self, step: Step, pause: Callable[[], None] | None = None, operands: Precision | None = None) -> Iterator[HiddenStates]:
        """Yield the hidden states of the sequences of a step, up to PASS_TOKENS tokens in a forward pass. A pass is computed when it is asked for.

        Their rows are those of the tokens that count in the loss.

        Args:
            step: the step.
            pause: function that a CPU calls after each block of a forward pass, where a pass may take many seconds. None = none.
            operands: precision of the operands of the model's products. None = the precision setting.

        Raises:
            InvalidValueError: if the text has ids that the model does not know.
        """
        for _, captured in self._passes([step], pause, operands):
            yield captured

    def by_step(
        self, steps: Sequence[Step], pause: Callable[[], None] | None = None, operands: Precision | None = None
    ) -> Iterator[Iterable[HiddenStates]]:
        """Yield the hidden states of each step. The passes of a single step are computed one by one, those of several steps at once.

        `pause` and `operands` are as in `hidden_states`.

        Raises:
            InvalidValueError: if the text has ids that the model does not know.
        """
        if len(steps) == 1:
            yield self.hidden_states(steps[0], pause, operands)
            return
        owners = [i for i, step in enumerate(steps) for _ in step.sequences]
        found: list[list[HiddenStates]] = [[] for _ in steps]
        for members, captured in self._passes(steps, pause, operands):
            for owner in dict.fromkeys(owners[i] for i in members):
                rows = [row for row, i in enumerate(members) if owners[i] == owner]  # side by side: members ascend
                found[owner].append(captured.of_sequences(slice(rows[0], rows[-1] + 1)))
        yield from found

    def _captured(self, batch: np.ndarray, operands: Precision | None) -> HiddenStates:
        """Run the model on sequences [B, T] of one length."""
        try:
            with use_precision(operands or precision()):
                return self.source.capture(mx.array(batch), with_embedding=self.with_embedding)
        except EmbeddingStreamError as error:
            raise EmbeddingStreamError(f"{error} Train the blocks alone: set embedding=False (--no-embedding).") from error

    def _passes(
        self, steps: Sequence[Step], pause: Callable[[], None] | None, operands: Precision | None
    ) -> Iterator[tuple[list[int], HiddenStates]]:
        """Yield batches of numbers of sequences, counted through all steps, with their hidden states."""
        sequences = [sequence for step in steps for sequence in step.sequences]
        counted = [mask for step in steps for mask in step.counted or ()]
        for members in batches([sequence.size for sequence in sequences], PASS_TOKENS):
            batch = np.stack([sequences[i] for i in members])
            if batch.size and not 0 <= batch.min() <= batch.max() < self.embedding_rows:  # MLX would read other memory
                raise InvalidValueError(
                    f"The text has token ids from {batch.min()} to {batch.max()}; the model knows 0 to {self.embedding_rows - 1}. "
                    "Tokenize it with the model's own tokenizer."
                )
            captured = self._captured(batch, operands)
            if counted:
                captured = replace(captured, mask=mx.array(np.stack([counted[i] for i in members])))
            if pause is not None and mx.default_device() == mx.Device(mx.cpu):
                for hidden in captured.hidden:
                    mx.eval(hidden)
                    pause()
            yield members, captured
