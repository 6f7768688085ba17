"""Compute the cells of the lenses that read a text: what to compute, and the one pass over the unembedding that does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from metalens.ops import lens_stats
from metalens.readings.rows import require_finite
from metalens.readings.source import RowSource, parts_of
from metalens.readings.statistics import Cells, cells_of, join_cells, select_cells


@dataclass(frozen=True, eq=False)
class Request:
    """The statistics to compute.

    Attributes:
        top_k: number of most likely tokens.
        targets, anti_targets: ids [T] for the positions to read, -1 = none; None = not asked for.
        chosen: ids of the chosen tokens.
        compare: whether to compare with the model's own prediction.
    """

    top_k: int = 10
    targets: np.ndarray | None = None
    anti_targets: np.ndarray | None = None
    chosen: tuple[int, ...] = ()
    compare: bool = True

    def part(self, where: slice) -> Request:
        """Return the request for some of the positions."""
        targets, anti_targets = (None if ids is None else ids[where] for ids in (self.targets, self.anti_targets))
        return replace(self, targets=targets, anti_targets=anti_targets)

    def labels(self, where: slice) -> mx.array | None:
        """Return the labels [c, C'] of some positions: target, anti-target, chosen tokens. [c] if C' = 1, None if there are none."""
        columns = [ids[where] for ids in (self.targets, self.anti_targets) if ids is not None]
        count = where.stop - where.start
        columns += [np.full(count, token, np.int32) for token in self.chosen]
        if len(columns) < 2:  # one label for each token is what every backend has a kernel for
            return mx.array(columns[0]) if columns else None
        return mx.array(np.stack(columns, axis=1))


def read_cells(sources: Sequence[RowSource], request: Request) -> list[tuple[Cells, Cells]]:
    """Compute the cells of the lenses that read one text, from one forward pass: for each lens its own [R, T], and the model's [1, T].

    Args:
        sources: the lenses, as in `parts_of`.
        request: the statistics, with the labels of the sources' positions.

    Raises:
        InvalidValueError: if a row of logits has no softmax.
    """
    parts, start = [], 0
    for rows, own in parts_of(sources):
        parts.append(part_cells(sources, request, rows, own, start))
        start += own.shape[0]
    return split_rows(sources, join_cells(parts))


def split_rows(sources: Sequence[RowSource], cells: Cells) -> list[tuple[Cells, Cells]]:
    """Return for each lens its rows, and the model's own row, which is the last one of the cells."""
    own, found, start = select_cells(cells, slice(-1, None), slice(None)), [], 0
    for source in sources:
        stop = start + len(source.layers)
        found.append((select_cells(cells, slice(start, stop), slice(None)), own))
        start = stop
    return found


def part_cells(sources: Sequence[RowSource], request: Request, rows: Sequence[mx.array], own: mx.array, start: int = 0) -> Cells:
    """Compute the cells of a part that begins at column `start`: those of the lenses, one after another, then the model's own row."""
    labels = request.labels(slice(start, start + own.shape[0]))
    stats = lens_stats(
        mx.concatenate([*rows, own[None]]), sources[0].head, request.top_k, own if request.compare else None, labels, reverse=request.compare
    )
    require_finite(stats)
    return cells_of(stats, int(request.targets is not None), int(request.anti_targets is not None))
