"""A language model that reads texts through lenses."""

from __future__ import annotations

from metalens.models.language_model import LanguageModel
from metalens.readings import generation, lenses_reader, reader, trajectory_reader


class ReadableModel(LanguageModel):
    """A language model with the functions of `metalens.readings` as methods: their argument `model` is the model itself."""

    read = reader.read
    trajectory = trajectory_reader.read_trajectory
    trajectories = lenses_reader.read_lenses
    generate_with_lens = generation.generate_with_lens
    generate_with_lenses = generation.generate_with_lenses
    generate_from_layer = generation.generate_from_layer
