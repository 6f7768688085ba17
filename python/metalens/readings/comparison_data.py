"""The data of a comparison: how far the predictions of two trajectories are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from metalens.readings.statistics import DIVERGENCES
from metalens.readings.trajectory_data import TrajectoryData

Between: TypeAlias = Literal["lenses", "models", "texts", "layers"]


@dataclass(frozen=True, eq=False)
class ComparisonData:
    """How far two predictions, p of `a` and q of `b`, are apart: float32 arrays [R, T].

    Attributes:
        kl: KL(p || q) in nats.
        reverse_kl: KL(q || p) in nats.
        js: Jensen-Shannon divergence in nats, 0 to log 2.
        tv: total variation sum |p - q| / 2, 0 to 1.
        between: what differs: 'lenses', 'models', 'texts' or 'layers'.
        labels: name of each row.
        names: names of the two sides.
        a, b: the trajectories. They are the same if the layers of one are compared: row r of it with row r + 1.
    """

    kl: np.ndarray
    reverse_kl: np.ndarray
    js: np.ndarray
    tv: np.ndarray
    between: Between
    labels: tuple[str, ...]
    names: tuple[str, str]
    a: TrajectoryData
    b: TrajectoryData

    def __repr__(self) -> str:
        rows, columns = self.kl.shape
        return f"Comparison({self.between}: {self.names[0]} and {self.names[1]}, {rows} rows x {columns} positions)"

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Return {"kl", "reverse_kl", "js", "tv": [R, T]}."""
        return {name: getattr(self, name) for name in DIVERGENCES}
