"""What all phases of a run share: the settings, the model, the processes, and the clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.layers import EMBEDDING, Layer
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

    def identity(self, kept: Iterable[Layer] = ()) -> TunedLens:
        """Return the identity, with a translator for every layer that the run trains, and for `kept` layers. It takes no memory before it is used.

        Raises:
            InvalidValueError: if the rank or the layers do not fit the model.
        """
        config, kept = self.config, set(kept)
        layers = None if config.layers is None else [*config.layers, *(layer for layer in kept if layer != EMBEDDING)]
        return TunedLens(
            len(self.capture.source),
            self.unembed.hidden_dim,
            rank=config.rank,
            bias_only=config.bias_only,
            layers=layers,
            embedding=config.embedding or EMBEDDING in kept,
            seed=config.seed or 0,
        )

    @cached_property
    def layers(self) -> list[Layer]:
        """Return the layers that the run trains, in all passes and processes."""
        return self.config.trained_layers(len(self.capture.source))

    @cached_property
    def parameters_per_layer(self) -> int:
        """Return the number of arrays of a translator."""
        return len(parameters_of(self.identity().translator_of(self.layers[0])))
