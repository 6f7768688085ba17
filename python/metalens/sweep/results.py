"""The results of a sweep that are there, by what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from metalens.sweep.cells import RESULT, Cell


@dataclass(frozen=True)
class Found:
    """A result and its file.

    Attributes:
        names: names of the cell: model, recipe, text, seed, and of an evaluation lens_model.
        file: path of the result, relative to the folder of the sweep.
        result: the contents of the file.
    """

    names: dict[str, Any]
    file: str
    result: dict[str, Any]

    @property
    def own(self) -> bool:
        """Tell whether the lens was read on the model that it was trained for."""
        return bool(self.names.get("lens_model") == self.names["model"])


class Results:
    """The results of the cells of a sweep.

    Args:
        out: folder of the sweep.
        lenses, evaluations: the cells.
    """

    def __init__(self, out: Path, lenses: Sequence[Cell], evaluations: Sequence[Cell]) -> None:
        self.out = out
        self.cells = [*lenses, *evaluations]
        self.lenses = self._found(lenses)
        self.evaluations = self._found(evaluations)

    def _found(self, cells: Sequence[Cell]) -> list[Found]:
        results = ((cell, cell.result(self.out)) for cell in cells)
        return [Found(cell.names, (cell.folder / RESULT).as_posix(), result) for cell, result in results if result is not None]

    @cached_property
    def missing(self) -> list[Cell]:
        """Return the cells that are not finished."""
        return [cell for cell in self.cells if cell.result(self.out) is None]

    @cached_property
    def own(self) -> list[Found]:
        """Return the evaluations of lenses on their own models."""
        return [each for each in self.evaluations if each.own]

    def lens_of(self, evaluation: Found) -> Found:
        """Return the lens that an evaluation is of."""
        wanted = {**evaluation.names, "model": evaluation.names["lens_model"]}
        return next(each for each in self.lenses if all(each.names[name] == wanted[name] for name in ("model", "recipe", "text", "seed")))

    def model(self, name: str) -> Found:
        """Return a lens of a model, for the sizes of the model."""
        return next(each for each in self.lenses if each.names["model"] == name)


def names_in(found: Sequence[Found], name: str) -> list[Any]:
    """Return the different values of a name, in the order of the results."""
    return list(dict.fromkeys(each.names[name] for each in found))


def select(found: Sequence[Found], **wanted: Any) -> list[Found]:
    """Return the results that have the wanted names."""
    return [each for each in found if all(each.names.get(name) == value for name, value in wanted.items())]
