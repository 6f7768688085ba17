"""Read one text through several lenses, in one forward pass of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np

from metalens.lenses.lens import Lens
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.readings.cells_reader import Request
from metalens.readings.comparison import (
    Comparison,
    compare_lenses,
    divergences_from_first,
    divergences_in_parts,
    join_divergences,
    layer_divergences_in_parts,
    require_layers,
)
from metalens.readings.source import RowSource
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import TrajectoryOptions, checked_part_size, join_trajectories, one_text, read_sources, source_parts
from metalens.utils.errors import InvalidValueError


class LensesPart(NamedTuple):
    """One part of a text through several lenses.

    Attributes:
        trajectories: one for each lens.
        comparisons: of each lens but the first with the first one, if they were asked for.
    """

    trajectories: list[Trajectory]
    comparisons: list[Comparison]


def read_lenses(
    model: LanguageModel, text: TokenInput, lenses: Sequence[Lens | str | Path | None], **options: Unpack[TrajectoryOptions]
) -> list[Trajectory]:
    """Read one text through several lenses. The model runs once, and its own prediction is computed once.

    Args:
        model, text, options: as in `read_trajectory`.
        lenses: the lenses, as `read_trajectory` takes one: [None, lens] = the logit lens and another one.

    Returns:
        one trajectory for each lens, each equal to that of `read_trajectory`.

    Raises:
        InvalidValueError, InvalidTypeError, FileNotFoundError: as `read_trajectory`, and if there is no lens.
    """
    return read_sources(*one_text(model, text, lenses, options))


def read_lenses_in_parts(
    model: LanguageModel,
    text: TokenInput,
    lenses: Sequence[Lens | str | Path | None],
    *,
    part_size: int | None = None,
    compare_lenses: bool = False,
    **options: Unpack[TrajectoryOptions],
) -> Iterator[LensesPart]:
    """Read one text through several lenses, and yield one part of its positions after another. The arguments are checked at once.

    Between two parts a caller can show progress, or stop. `join_trajectories` joins the parts of a lens.

    Args:
        model, text, lenses, options: as in `read_lenses`.
        part_size: as in `read_trajectory_parts`.
        compare_lenses: also compare each lens but the first with the first one, in the same forward pass.

    Raises:
        InvalidValueError, InvalidTypeError, FileNotFoundError: as `read_lenses`, and for a part_size below 1.
    """
    return _parts(*one_text(model, text, lenses, options), checked_part_size(part_size), compare_lenses)


def _parts(sources: list[RowSource], request: Request, size: int | None, compared: bool) -> Iterator[LensesPart]:
    head = sources[0].head
    for trajectories, rows in source_parts(sources, request, size):
        yield LensesPart(trajectories, compare_lenses(trajectories, divergences_from_first(rows, head)) if compared else [])


def join_lenses_parts(parts: Sequence[LensesPart]) -> LensesPart:
    """Join neighboring parts of one text, in order.

    Raises:
        InvalidValueError: as `join_trajectories`.
    """
    if not parts:
        raise InvalidValueError("There is no part to join.")
    trajectories = [join_trajectories(of_lens) for of_lens in zip(*(part.trajectories for part in parts), strict=True)]
    pairs = zip(*(part.comparisons for part in parts), strict=True)
    apart = [join_divergences([comparison.to_numpy() for comparison in of_pair]) for of_pair in pairs]
    return LensesPart(trajectories, compare_lenses(trajectories, apart) if apart else [])


def compare_in_parts(
    model: LanguageModel,
    text: TokenInput,
    other: TokenInput | None,
    lens: Lens | str | Path | None = None,
    *,
    part_size: int | None = None,
    embedding: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Compare two texts through one lens, part by part; or every layer of one text with the next one. The arguments are checked at once.

    Args:
        model, text, lens: as in `read_trajectory`.
        other: a text with as many tokens. None = compare the layers.
        part_size: as in `read_trajectory_parts`.
        embedding: as in `read_trajectory`.

    Returns:
        an iterator of {"kl", "reverse_kl", "js", "tv": [R, c]}; between layers [R - 1, c], where row r compares layer r with the next one.

    Raises:
        InvalidValueError, InvalidTypeError, FileNotFoundError: as `read_trajectory`, and for texts of unequal length, for a model of one layer
            without another text, and for a part_size below 1.
    """
    size = checked_part_size(part_size)
    ((a,), _) = one_text(model, text, [lens], {"embedding": embedding})
    if other is None:
        return layer_divergences_in_parts(require_layers(a), size)
    ((b,), _) = one_text(model, other, [lens], {"embedding": embedding})
    if len(a.positions) != len(b.positions):
        raise InvalidValueError(
            f"Texts are compared token by token: these have {len(a.positions)} and {len(b.positions)}. Give texts of equal length."
        )
    return divergences_in_parts(a, b, size)
