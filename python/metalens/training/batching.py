"""From sequences to hidden states: short sequences, and short steps, go through the model together.

A forward pass over few tokens uses the kernels badly. Therefore several steps of fewer than PASS_TOKENS tokens share a forward pass, always the same
steps: 0 to n - 1, n to 2 n - 1, and so on. A run that was stopped between them captures its group again, and so goes on with the same bits.

With shuffle_tokens more steps are captured together, and their tokens are shuffled among them: the tokens of one sequence are much alike, and a
gradient of tokens from many places has less noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.models.capture import EmbeddingStreamError, HiddenStates, ResidualCapture, joined
from metalens.models.language_model import DEFAULT_SEQUENCE
from metalens.models.layers import Layer
from metalens.ops import precision, use_precision
from metalens.ops.backends import Precision
from metalens.training.config import TrainingConfig
from metalens.training.data import Sampler, Step, batches
from metalens.utils.errors import InvalidValueError

# Tokens of a forward pass: enough rows for the kernels, and no more memory than one sequence of the default length.
PASS_TOKENS = DEFAULT_SEQUENCE
STREAM = 0x7C2D93  # sets the random numbers apart from those of the sampler of the text and of the vocabulary


def steps_together(config: TrainingConfig) -> int:
    """Return the number of steps that are captured together."""
    return max(1, max(PASS_TOKENS, config.shuffle_tokens) // config.step_tokens)


@dataclass(frozen=True)
class StepGroup:
    """Steps that are captured together.

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
        shuffled: let `by_step` shuffle the tokens of the steps that it gets among them.
        seed: seed of the order. None = 0.
    """

    def __init__(
        self, source: ResidualCapture, embedding_rows: int, *, with_embedding: bool = False, shuffled: bool = False, seed: int | None = None
    ) -> None:
        self.source, self.embedding_rows = source, embedding_rows
        self.with_embedding = with_embedding
        self.shuffled, self.seed = shuffled, int(seed or 0)

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

        A shuffled step has as many tokens as before, of all processes together. Which they are depends on the seed and the place in the text alone.

        `pause` and `operands` are as in `hidden_states`.

        Raises:
            InvalidValueError: if the text has ids that the model does not know.
        """
        if len(steps) == 1:
            yield self.hidden_states(steps[0], pause, operands)
            return
        if self.shuffled:
            yield from self._shuffled(steps, pause, operands)
            return
        owners = [i for i, step in enumerate(steps) for _ in step.sequences]
        found: list[list[HiddenStates]] = [[] for _ in steps]
        for members, captured in self._passes(steps, pause, operands):
            for owner in dict.fromkeys(owners[i] for i in members):
                rows = [row for row, i in enumerate(members) if owners[i] == owner]  # side by side: members ascend
                found[owner].append(captured.of_sequences(slice(rows[0], rows[-1] + 1)))
        yield from found

    def _shuffled(self, steps: Sequence[Step], pause: Callable[[], None] | None, operands: Precision | None) -> Iterator[Iterable[HiddenStates]]:
        """Yield the hidden states of each step, with the tokens of all shuffled among them."""
        owners = dealt(steps, self.seed)
        streams, numbers = self._together(steps, pause, operands)
        for i in range(len(steps)):
            rows = np.flatnonzero(owners[numbers] == i)
            yield [streams.of_tokens(mx.array(rows.astype(np.int32)))] if streams is not None and rows.size else []

    def _together(
        self, steps: Sequence[Step], pause: Callable[[], None] | None, operands: Precision | None
    ) -> tuple[HiddenStates | None, np.ndarray]:
        """Return this process's tokens of some steps as one sequence [1, N], None if it has none, and their numbers among those of all processes."""
        before = np.cumsum([0, *(step.tokens for step in steps)])
        starts = [int(first) + start for step, first in zip(steps, before, strict=False) for start in step.starts]
        masks = [mask for step in steps for mask in step.counted or ()]
        sizes = [int(mask.sum()) for mask in masks] or [sequence.size for step in steps for sequence in step.sequences]
        passes, numbers = [], [np.zeros(0, int)]
        for members, captured in self._passes(steps, pause, operands):
            mx.eval(captured.hidden, *([] if captured.embedding is None else [captured.embedding]))
            passes.append(captured)
            numbers += [np.arange(starts[i], starts[i] + sizes[i]) for i in members]
        return joined(passes) if passes else None, np.concatenate(numbers)

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


def dealt(steps: Sequence[Step], seed: int) -> np.ndarray:
    """Deal the tokens of some steps out to them: return the number of its step for each token, of all processes, [sum of their tokens].

    Each step gets as many tokens as it has. They are dealt by their places in the sequences, those of one place in random order. So every step has
    about as many tokens of each place. With an order that is random alone, layer 1 of Gemma 3 got worse, whose first tokens are unlike all others.

    Args:
        steps: at least one step, made by `Sampler.take_step`.
        seed: seed of the order, which also depends on the place of the steps in the text.
    """
    sizes = [step.tokens for step in steps]
    positions = np.concatenate([step.positions for step in steps])
    state = steps[0].state
    raw = np.random.PCG64(np.random.SeedSequence([STREAM, seed, state["epoch"], state["index"]])).random_raw(positions.size)
    share = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])  # of a step that has been dealt before one of its tokens is
    owners = np.empty(positions.size, np.int64)
    owners[np.lexsort((raw, positions))] = np.repeat(np.arange(len(steps)), sizes)[np.argsort(share, kind="stable")]
    return owners
