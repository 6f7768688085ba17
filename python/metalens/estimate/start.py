"""The memory of the lens that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.facts import ModelDimensions
from metalens.models.layers import Layer
from metalens.training.config import TrainingConfig
from metalens.training.start import kept_layers, require_start


@dataclass(frozen=True)
class StartSizes:
    """Bytes of the lens that a run starts from, in float32.

    Attributes:
        kept: translators of layers that the run does not train, which it keeps to its end.
        shared: translators that are those of the training, as long as no step has changed them.
        others: the rest, which the run needs until it has made its own of it.
    """

    kept: int
    shared: int
    others: int

    @classmethod
    def of(cls, given: TunedLens | str | Path, d: ModelDimensions, config: TrainingConfig, part: float = 1.0) -> StartSizes:
        """Measure a lens, which is read.

        Args:
            given: the lens, or the path of one.
            d: dimensions of the model.
            config: the settings of the run.
            part: part of the trained layers that one process trains, 0 to 1.

        Raises:
            FileNotFoundError, InvalidValueError: as `TunedLens.load`, and if the run can't start from this lens.
        """
        lens = given if isinstance(given, TunedLens) else TunedLens.load(given)
        fresh = TunedLens(d.num_layers, d.hidden_size, rank=config.rank, bias_only=config.bias_only, layers=config.layers, embedding=config.embedding)
        require_start(lens, fresh)
        sizes: Mapping[Layer, int] = {
            layer: 4 * sum(array.size for array in parameters_of(lens.translator_of(layer)).values()) for layer in lens.translated
        }
        kept = sum(sizes[layer] for layer in kept_layers(lens, config.trained_layers(d.num_layers)))
        same = lens.variant == fresh.variant and config.dtype != "bfloat16"
        shared = round(part * (sum(sizes.values()) - kept)) if same else 0
        return cls(kept, shared, sum(sizes.values()) - kept - shared)

    def in_type(self, config: TrainingConfig) -> StartSizes:
        """Return the sizes of the same lens for a run with these settings, whose type of numbers may be another."""
        return self if config.dtype != "bfloat16" else StartSizes(self.kept, 0, self.shared + self.others)
