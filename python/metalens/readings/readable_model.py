"""A language model that reads texts through lenses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from metalens.lenses.lens import Lens
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.models.unembed import NormFunction
from metalens.readings.generation import GeneratedToken, GenerationStep, generate_from_layer, generate_with_lens
from metalens.readings.reader import read
from metalens.readings.reading import Reading
from metalens.readings.texts import Texts
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import TrajectoryOptions, read_trajectory


class ReadableModel(LanguageModel):
    """A language model with the functions of `metalens.readings` as methods."""

    @overload
    def read(
        self,
        text: TokenInput,
        lens: Lens | str | Path | None = None,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        final_norm: NormFunction | None = None,
        skip_norm: bool = False,
    ) -> Reading: ...
    @overload
    def read(
        self,
        text: Texts,
        lens: Lens | str | Path | None = None,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        final_norm: NormFunction | None = None,
        skip_norm: bool = False,
    ) -> list[Reading]: ...
    def read(
        self,
        text: TokenInput | Texts,
        lens: Lens | str | Path | None = None,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        final_norm: NormFunction | None = None,
        skip_norm: bool = False,
    ) -> Reading | list[Reading]:
        """Read a text, or a list of texts, through a lens: see `metalens.readings.read`."""
        return read(self, text, lens, top_k, layers, position, final_norm, skip_norm)

    @overload
    def trajectory(self, text: TokenInput, lens: Lens | str | Path | None = None, **options: Unpack[TrajectoryOptions]) -> Trajectory: ...
    @overload
    def trajectory(self, text: Texts, lens: Lens | str | Path | None = None, **options: Unpack[TrajectoryOptions]) -> list[Trajectory]: ...
    def trajectory(
        self, text: TokenInput | Texts, lens: Lens | str | Path | None = None, **options: Unpack[TrajectoryOptions]
    ) -> Trajectory | list[Trajectory]:
        """Read every statistic of a text, or of several: see `metalens.readings.read_trajectory`, which has the options."""
        return read_trajectory(self, text, lens, **options)

    def generate_with_lens(self, prompt: TokenInput, lens: Lens | str | Path | None = None, **options: Any) -> Iterator[GenerationStep]:
        """Generate text and read every layer: see `metalens.readings.generate_with_lens`, which has the options."""
        return generate_with_lens(self, prompt, lens, **options)

    def generate_from_layer(self, prompt: TokenInput, layer: int, lens: Lens | str | Path | None = None, **options: Any) -> Iterator[GeneratedToken]:
        """Generate text from one block, through a lens: see `metalens.readings.generate_from_layer`, which has the options."""
        return generate_from_layer(self, prompt, layer, lens, **options)
