"""What a lens says of a text: predictions and statistics of every layer, as values, tables and pictures."""

from metalens.readings.chosen_tokens import ChosenToken
from metalens.readings.comparison import Comparison, compare, compare_layers
from metalens.readings.generation import GeneratedToken, GenerationStep, generate_from_layer, generate_with_lens
from metalens.readings.numbering import EMBEDDING, layer_of_upstream, upstream_layer
from metalens.readings.reader import read
from metalens.readings.reading import Reading
from metalens.readings.statistics import DIVERGENCES, STATISTICS
from metalens.readings.top_tokens import Predictions, TopToken
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import join_trajectories, read_trajectory, read_trajectory_parts

__all__ = [
    "DIVERGENCES",
    "EMBEDDING",
    "STATISTICS",
    "ChosenToken",
    "Comparison",
    "GeneratedToken",
    "GenerationStep",
    "Predictions",
    "Reading",
    "TopToken",
    "Trajectory",
    "compare",
    "compare_layers",
    "generate_from_layer",
    "generate_with_lens",
    "join_trajectories",
    "layer_of_upstream",
    "read",
    "read_trajectory",
    "read_trajectory_parts",
    "upstream_layer",
]
