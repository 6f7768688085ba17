"""The state of a run: everything that its next step depends on, beside the position in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metalens.models.layers import Layer
from metalens.training.config import TrainingConfig
from metalens.training.guard import BestStates
from metalens.training.input_scale import InputScale
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
        best: best checked state of each layer of the current pass, for the guard.
        skipped: number of steps that were skipped because a loss or gradient was not finite.
        checked: step of this pass after which the guard has checked the layers last. -1 = it has not.
    """

    parameters: dict[Layer, Parameters]
    optimizer: LensOptimizer | None = None
    pass_index: int = 0
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    best: BestStates = field(default_factory=BestStates)
    checked: int = -1

    def start_pass(self, config: TrainingConfig, layers: Sequence[Layer], scales: Mapping[Layer, InputScale] | None = None) -> LensOptimizer:
        """Make the optimizer for the layers of a pass. `scales` as in `LensOptimizer`."""
        self.optimizer = LensOptimizer(config, {layer: self.parameters[layer] for layer in layers}, scales)
        return self.optimizer

    def end_pass(self) -> None:
        """Go on to the next pass."""
        self.pass_index, self.step, self.optimizer, self.best = self.pass_index + 1, 0, None, BestStates()
        self.checked = -1

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint, by name."""
        assert self.optimizer is not None
        found = {f"parameters.{layer}.{name}": p for layer, parameters in self.parameters.items() for name, p in parameters.items()}
        found |= {f"optimizer.{name}": a for name, a in self.optimizer.state().items()}
        return found | {f"best.{name}": a for name, a in self.best.arrays().items()}

    def set_back(self, layer: Layer) -> None:
        """Return a layer to its best checked state, with half the rate and without momentum."""
        assert self.optimizer is not None
        self.parameters[layer] = dict(self.best.parameters[layer])
        self.optimizer.set_back(layer, self.parameters[layer])

    def numbers(self) -> dict[str, int]:
        """Return the numbers of a checkpoint, by name."""
        return {"pass": self.pass_index, "pass_step": self.step, "tokens": self.tokens, "skipped": self.skipped, "checked": self.checked}

    def restore(self, arrays: Mapping[str, mx.array], numbers: Mapping[str, Any], config: TrainingConfig, passes: Sequence[Sequence[Layer]]) -> None:
        """Take over the `arrays` and `numbers` of a checkpoint.

        Args:
            arrays, numbers: of the checkpoint.
            config: the settings.
            passes: layers that this process trains in each pass.

        Raises:
            KeyError, IndexError, TypeError: if a number or an array is missing or out of range.
        """
        self.pass_index, self.step = int(numbers["pass"]), int(numbers["pass_step"])
        if not (0 <= self.pass_index < len(passes) and 0 <= self.step <= config.num_steps):
            raise IndexError(f"pass {self.pass_index}, step {self.step}")
        self.tokens, self.skipped = int(numbers["tokens"]), int(numbers["skipped"])
        self.checked = int(numbers.get("checked", -1))  # a version without a guard has none
        for layer, parameters in self.parameters.items():
            self.parameters[layer] = {name: arrays[f"parameters.{layer}.{name}"] for name in parameters}
        optimizer = self.start_pass(config, passes[self.pass_index])
        self.best = BestStates.from_arrays({name.removeprefix("best."): a for name, a in arrays.items() if name.startswith("best.")})
        optimizer.restore({name.removeprefix("optimizer."): a for name, a in arrays.items() if name.startswith("optimizer.")})
