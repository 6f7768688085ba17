"""The data of a trajectory: what every layer predicts at every position, as arrays of statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import mlx.core as mx
import numpy as np

from metalens.readings.numbering import Layer, layer_name
from metalens.readings.rows import is_whole
from metalens.readings.source import RowSource
from metalens.readings.statistics import Cells, cell_arrays, select_cells, settled_from
from metalens.utils.errors import InvalidTypeError, InvalidValueError

FROM_FILE = "This trajectory was read from a file, without its model and lens. Read the text again: model.trajectory(text, lens)."


@dataclass(frozen=True, eq=False, kw_only=True)
class TrajectoryData(Cells):
    """What one lens reads in one text: R layers x T positions. The arrays are those of `Cells`; the methods take layers, not rows.

    The cell of a layer and a position is the prediction of the token after this position.

    Attributes:
        layers: layers of the rows, R in number: numbers of blocks, and 'embedding'.
        token_ids: [T] int32 ids of the tokens that were read.
        target_ids: [T] int32 ids that cross_entropy and rank are about, -1 = none; by default the next tokens. None = no targets.
        anti_target_ids: [T] int32 ids that the targets are compared with, or None.
        chosen_ids: ids of the chosen tokens, C in number.
        texts: {id: text} of every id in this trajectory.
        first_position: position of the first column in the whole text.
        lens: name of the lens: 'logit lens', 'tuned lens', or the name of a function. 'tuned lens, token shift 2' was trained to predict the token
            after the next one. Its kl, agrees, cross_entropy and rank are about the next token all the same, unless targets were given.
        untranslated: layers that the lens reads as the logit lens does, because it has no translator for them.
        mask_input: whether the tokens of the text were ruled out in every prediction.
        model_name: path or hub id of the model, or None.
        num_layers: L, blocks of the model.
        vocab_size: number of tokens that can be predicted.
        model: the model's own prediction: cells of one row [1, T].
        source: the model, the lens and the text, to read them again. None = this trajectory comes from a file.
    """

    layers: tuple[Layer, ...]
    token_ids: np.ndarray
    target_ids: np.ndarray | None
    anti_target_ids: np.ndarray | None
    chosen_ids: tuple[int, ...]
    texts: Mapping[int, str]
    first_position: int
    lens: str
    untranslated: tuple[Layer, ...]
    mask_input: bool
    model_name: str | None
    num_layers: int
    vocab_size: int
    model: Cells
    source: RowSource | None = None

    def __len__(self) -> int:
        """Return T, the number of positions."""
        return len(self.token_ids)

    def __repr__(self) -> str:
        text = "".join(self.tokens)
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        return f"Trajectory({self.lens}, {len(self.layers)} layers x {len(self)} positions: {shown!r})"

    @property
    def tokens(self) -> list[str]:
        """Return the text of each token that was read."""
        return [self.texts[int(i)] for i in self.token_ids]

    @property
    def positions(self) -> range:
        """Return the positions in the whole text."""
        return range(self.first_position, self.first_position + len(self))

    @property
    def prediction_depth(self) -> np.ndarray:
        """Return for each position [T] the first row from which on every most likely token is the model's; R if the last row's is another."""
        return settled_from(self.top_ids[..., 0] == self.model.top_ids[..., 0])

    def label(self, layer: Layer) -> str:
        """Return the name of a layer's row: 'layer 3' or 'embedding', with a star if the lens does not translate it."""
        return layer_name(layer, layer not in self.untranslated)

    def row(self, layer: Layer) -> int:
        """Return the row of a layer.

        Args:
            layer: number of a block, negative from the model's last one, or 'embedding'.

        Raises:
            InvalidValueError: if this layer was not read.
        """
        number = layer + self.num_layers if is_whole(layer) and int(layer) < 0 else layer  # type: ignore[operator]
        if number not in self.layers:
            raise InvalidValueError(f"Layer {layer} was not read; this trajectory has layers {', '.join(map(str, self.layers))}.")
        return self.layers.index(number)

    def column(self, position: int) -> int:
        """Return the column of a position of the whole text; a negative position counts from the last column.

        Raises:
            InvalidValueError: if this position was not read.
            InvalidTypeError: if it is no whole number.
        """
        if not is_whole(position):
            raise InvalidTypeError(f"A position must be a whole number, got {position!r:.100}.")
        column = position + len(self) if position < 0 else position - self.first_position
        if not 0 <= column < len(self):
            raise InvalidValueError(
                f"Position {position} was not read; this trajectory has positions {self.positions.start} to {self.positions.stop - 1}."
            )
        return column

    def select(self, layers: Sequence[Layer] | None = None, positions: slice | int | None = None) -> Self:
        """Return the trajectory of some layers, in the given order, and of some neighboring positions.

        Args:
            layers: layers as `row` takes them; None = all.
            positions: one position as `column` takes it, or a slice of columns with step 1; None = all.

        Raises:
            InvalidValueError: if a layer or position was not read, if nothing is left, or for a slice with another step.
        """
        rows = list(range(len(self.layers))) if layers is None else [self.row(layer) for layer in layers]
        if not isinstance(positions, slice):
            first = 0 if positions is None else self.column(positions)
            positions = slice(first, len(self) if positions is None else first + 1)
        start, stop, step = positions.indices(len(self))
        if step != 1 or start >= stop or not rows:
            raise InvalidValueError(f"Select one layer and one position at least, with step 1; got {len(rows)} layers and positions {positions}.")
        columns, chosen = slice(start, stop), tuple(self.layers[row] for row in rows)
        where = range(self.first_position + start, self.first_position + stop)
        return replace(
            self,
            **cell_arrays(select_cells(self.cells(), rows, columns)),
            layers=chosen,
            untranslated=tuple(layer for layer in chosen if layer in self.untranslated),
            token_ids=self.token_ids[columns],
            target_ids=None if self.target_ids is None else self.target_ids[columns],
            anti_target_ids=None if self.anti_target_ids is None else self.anti_target_ids[columns],
            first_position=where.start,
            model=select_cells(self.model, slice(None), columns),
            source=None if self.source is None else self.source.select(chosen, where),
        )

    def cells(self) -> Cells:
        """Return the arrays alone."""
        return Cells(**{field.name: getattr(self, field.name) for field in fields(Cells)})

    def require_source(self) -> RowSource:
        """Return the source (InvalidValueError if this trajectory comes from a file)."""
        if self.source is None:
            raise InvalidValueError(FROM_FILE)
        return self.source

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Return every statistic [R, T], top_ids and top_probabilities [R, T, k], chosen_probabilities and chosen_ranks [C, R, T], by name."""
        more = ("lse", "top_ids", "top_probabilities", "chosen_probabilities", "chosen_ranks")
        return self.statistics() | {name: getattr(self, name) for name in more}


def token_texts(model: Any, *ids: np.ndarray | None) -> dict[int, str]:
    """Return {id: text} for the ids in some arrays; ids below 0 are none."""
    flat = np.unique(np.concatenate([np.asarray(each).reshape(-1) for each in ids if each is not None]))
    texts: dict[int, str] = model.token_strings(mx.array(flat[flat >= 0].astype(np.int32)))
    return texts
