"""Compute the cells of a source: what to compute, and the one pass over the unembedding that does it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from metalens.ops import lens_stats
from metalens.readings.rows import require_finite
from metalens.readings.source import RowSource
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


def read_cells(source: RowSource, request: Request) -> tuple[Cells, Cells]:
    """Compute the cells of a source: those of the lens [R, T], and of the model [1, T]. `request` has the labels of the source's positions.

    Raises:
        InvalidValueError: if a row of logits has no softmax.
    """
    parts, start = [], 0
    for rows, own in source.parts():
        parts.append(part_cells(source, request, rows, own, start))
        start += own.shape[0]
    return split_rows(join_cells(parts))


def split_rows(cells: Cells) -> tuple[Cells, Cells]:
    """Return the rows of the lens, and the model's own, which is the last one."""
    return select_cells(cells, slice(None, -1), slice(None)), select_cells(cells, slice(-1, None), slice(None))


def part_cells(source: RowSource, request: Request, rows: mx.array, own: mx.array, start: int = 0) -> Cells:
    """Compute the cells [R + 1, c] of a part that begins at column `start`: those of the lens, then the model's own."""
    labels = request.labels(slice(start, start + own.shape[0]))
    every = mx.concatenate([rows, own[None]])
    stats = lens_stats(every, source.head, request.top_k, own if request.compare else None, labels, reverse=request.compare)
    require_finite(stats)
    return cells_of(stats, int(request.targets is not None), int(request.anti_targets is not None))
