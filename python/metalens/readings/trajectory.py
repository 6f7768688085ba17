"""The trajectory of a text: its data, and what can be done with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metalens.readings.cells_reader import Request, read_cells
from metalens.readings.chosen_tokens import ChosenToken, token_ids_of
from metalens.readings.comparison import Comparison, compare, compare_layers
from metalens.readings.export import data_frame, load_fields, save_trajectory, trajectory_fields, trajectory_json
from metalens.readings.plotly_map import trajectory_plotly
from metalens.readings.trajectory_data import TrajectoryData, token_texts
from metalens.readings.trajectory_map import contents_of, map_figure
from metalens.utils.errors import InvalidValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import


class Trajectory(TrajectoryData):
    """What one lens reads in one text: R layers x T positions, with every statistic of `TrajectoryData` and `Cells` as an array."""

    def _repr_html_(self) -> str:
        """Return the viewer's page with this trajectory, for notebooks."""
        from metalens.viewer.notebook import trajectory_html

        return trajectory_html(self.to_json(compact=True))

    # ------------------------------------------------------------------ chosen tokens

    def chosen(self, token: str | int) -> ChosenToken:
        """Return one of the chosen tokens, with its probability and rank in every cell.

        Args:
            token: its id or its text.

        Raises:
            InvalidValueError: if it is not among the chosen tokens.
        """
        for i, token_id in enumerate(self.chosen_ids):
            if token in (token_id, self.texts[token_id]):
                return ChosenToken(self, token_id, self.chosen_probabilities[i], self.chosen_ranks[i], self.model.chosen_ranks[i, 0])
        raise InvalidValueError(
            f"{token!r} is none of the chosen tokens {[self.texts[i] for i in self.chosen_ids]}. Use follow, or read it with tokens=."
        )

    def follow(self, tokens: Sequence[str | int]) -> Trajectory:
        """Return this trajectory with other chosen tokens. The text is read again, with one pass over the unembedding.

        Args:
            tokens: texts or ids of single tokens.

        Raises:
            InvalidValueError: if a text is no single token, an id is no token, or this trajectory comes from a file.
        """
        source = self.require_source()
        ids = token_ids_of(source.model, tokens)
        ((lens, own),) = read_cells([source], Request(top_k=1, chosen=ids, compare=False))
        texts = {**self.texts, **token_texts(source.model, np.array(ids))}
        model = replace(self.model, chosen_log_probs=own.chosen_log_probs, chosen_ranks=own.chosen_ranks)
        return replace(self, chosen_log_probs=lens.chosen_log_probs, chosen_ranks=lens.chosen_ranks, chosen_ids=ids, texts=texts, model=model)

    # ------------------------------------------------------------------ comparisons

    def compare(self, other: Trajectory) -> Comparison:
        """Compare this trajectory with another one, cell by cell: see `metalens.readings.comparison.compare`."""
        return compare(self, other)

    def compare_layers(self) -> Comparison:
        """Compare every layer with the next one: see `metalens.readings.comparison.compare_layers`."""
        return compare_layers(self)

    # ------------------------------------------------------------------ pictures

    def plot(self, statistic: str = "entropy", title: str = "", *, depth: bool = False, **look: Any) -> Figure:
        """Draw a statistic by matplotlib, layers by positions: see `metalens.readings.trajectory_map.map_figure`, which has the options.

        Args:
            statistic: name of a statistic in `metalens.readings.STATISTICS`.
            title: text above the picture.
            depth: also draw the prediction depth, as a line.
            look: `cmap`, `figsize`.

        Raises:
            InvalidValueError: if there is no such statistic, or it was not computed.
        """
        return map_figure(contents_of(self, statistic, depth=depth), title, **look)

    def figure(self, statistic: str = "entropy", title: str = "", *, depth: bool = False) -> Any:
        """Return an interactive figure by plotly: see `metalens.readings.plotly_map.trajectory_plotly`."""
        return trajectory_plotly(self, statistic, title, depth=depth)

    # ------------------------------------------------------------------ files and tables

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per layer and position: see `metalens.readings.export.data_frame`."""
        return data_frame(self)

    def to_json(self, *, compact: bool = False) -> dict[str, Any]:
        """Return the trajectory as JSON holds it: see `metalens.readings.export.trajectory_json`."""
        return trajectory_json(self, compact=compact)

    @classmethod
    def from_json(cls, data: Any) -> Trajectory:
        """Return the trajectory that `to_json` wrote. It has no source. Raises InvalidValueError for anything else."""
        return cls(**trajectory_fields(data))

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write a file: .json or .safetensors. See `metalens.readings.export.save_trajectory`."""
        save_trajectory(self, path, force=force)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a file that `save` wrote. See `metalens.readings.export.load_fields`."""
        return cls(**load_fields(path))
