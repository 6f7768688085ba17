"""The state of a run: everything that its next step depends on, beside the position in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalens.training.config import TrainingConfig
from metalens.training.optimizer import LensOptimizer, Parameters


def in_training_dtype(parameters: Mapping[str, mx.array], config: TrainingConfig) -> Parameters:
    """Return the parameters of a layer in the type that they have during training."""
    dtype = mx.bfloat16 if config.dtype == "bfloat16" else mx.float32
    return {name: p.astype(dtype) for name, p in parameters.items()}


@dataclass
class TrainingState:
    """The state of a run in one process.

    Attributes:
        parameters: parameters of each layer that this process trains, by layer.
        optimizer: optimizer of the layers of the current pass. None = the pass has not begun.
        pass_index: number of the current pass over the text, from 0.
        step: number of steps that are done in this pass.
        tokens: number of tokens seen in all passes, those of warm starts included.
        skipped: number of steps that were skipped because a loss or gradient was not finite.
    """

    parameters: dict[int, Parameters]
    optimizer: LensOptimizer | None = None
    pass_index: int = 0
    step: int = 0
    tokens: int = 0
    skipped: int = 0

    def start_pass(self, config: TrainingConfig, layers: Sequence[int]) -> LensOptimizer:
        """Make the optimizer for the layers of a pass."""
        self.optimizer = LensOptimizer(config, {layer: self.parameters[layer] for layer in layers})
        return self.optimizer

    def end_pass(self) -> None:
        """Go on to the next pass."""
        self.pass_index, self.step, self.optimizer = self.pass_index + 1, 0, None

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint, by name."""
        assert self.optimizer is not None
        found = {f"parameters.{layer}.{name}": p for layer, parameters in self.parameters.items() for name, p in parameters.items()}
        return found | {f"optimizer.{name}": a for name, a in self.optimizer.state().items()}

    def numbers(self) -> dict[str, int]:
        """Return the numbers of a checkpoint, by name."""
        return {"pass": self.pass_index, "pass_step": self.step, "tokens": self.tokens, "skipped": self.skipped}

    def restore(self, arrays: Mapping[str, mx.array], numbers: Mapping[str, Any], config: TrainingConfig, passes: Sequence[Sequence[int]]) -> None:
        """Take over the `arrays` and `numbers` of a checkpoint.

        Args:
            arrays, numbers: of the checkpoint.
            config: the settings.
            passes: layers that this process trains in each pass.
        """
        self.pass_index, self.step = int(numbers["pass"]), int(numbers["pass_step"])
        self.tokens, self.skipped = int(numbers["tokens"]), int(numbers["skipped"])
        for layer, parameters in self.parameters.items():
            self.parameters[layer] = {name: arrays[f"parameters.{layer}.{name}"] for name in parameters}
        optimizer = self.start_pass(config, passes[self.pass_index])
        optimizer.restore({name.removeprefix("optimizer."): a for name, a in arrays.items() if name.startswith("optimizer.")})
