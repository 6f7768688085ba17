"""What all phases of a run share: the settings, the model, the processes, and the clock."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.unembed import Unembed
from metalens.training.batching import BatchedCapture
from metalens.training.clock import Clock
from metalens.training.config import TrainingConfig
from metalens.training.distributed import Group
from metalens.training.vocabulary import VocabularySampler


@dataclass(frozen=True)
class RunContext:
    """What all phases of a run share.

    Attributes:
        config: the settings.
        capture: captures the model's hidden states.
        unembed: the model's norm and head.
        group: processes of the run.
        clock: clock of the work at hand.
        vocabulary: draws the ids that a step compares. None = it compares all of them.
    """

    config: TrainingConfig
    capture: BatchedCapture
    unembed: Unembed
    group: Group
    clock: Clock
    vocabulary: VocabularySampler | None = None

    def identity(self) -> TunedLens:
        """Return the lens that training starts from. Its arrays take no memory before they are used.

        Raises:
            InvalidValueError: if the rank or the layers do not fit the model.
        """
        config, layers = self.config, len(self.capture.source)
        return TunedLens(layers, self.unembed.hidden_dim, rank=config.rank, bias_only=config.bias_only, layers=config.layers, seed=config.seed or 0)

    @cached_property
    def layers(self) -> list[int]:
        """Return the layers that the run trains, in all passes and processes."""
        return list(self.identity().layers)

    @cached_property
    def parameters_per_layer(self) -> int:
        """Return the number of arrays of a translator."""
        return len(parameters_of(self.identity().translators[self.layers[0]]))
