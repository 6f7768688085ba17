"""What a lens says of a text: predictions and statistics of every layer, as values, tables and pictures."""

from metalens.readings.chosen_tokens import ChosenToken
from metalens.readings.comparison import Comparison, compare, compare_layers
from metalens.readings.generation import GeneratedToken, GenerationStep, generate_from_layer, generate_with_lens, generate_with_lenses
from metalens.readings.lenses_reader import LensesPart, compare_in_parts, join_lenses_parts, read_lenses, read_lenses_in_parts
from metalens.readings.numbering import EMBEDDING, layer_of_upstream, upstream_layer
from metalens.readings.reader import read
from metalens.readings.reading import Reading
from metalens.readings.statistics import DIVERGENCES, STATISTICS
from metalens.readings.sublayers import read_sublayers
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
    "LensesPart",
    "Predictions",
    "Reading",
    "TopToken",
    "Trajectory",
    "compare",
    "compare_in_parts",
    "compare_layers",
    "generate_from_layer",
    "generate_with_lens",
    "generate_with_lenses",
    "join_lenses_parts",
    "join_trajectories",
    "layer_of_upstream",
    "read",
    "read_lenses",
    "read_lenses_in_parts",
    "read_sublayers",
    "read_trajectory",
    "read_trajectory_parts",
    "upstream_layer",
]
