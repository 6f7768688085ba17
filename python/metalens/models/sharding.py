"""A model that is divided among processes, as the rest of the library sees it. `metalens.models.tensor_parallel` divides it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from metalens.models.layers import Layer
from metalens.utils.errors import InvalidTypeError, InvalidValueError

L = TypeVar("L", bound=Layer)


class Processes(Protocol):
    """The processes among which a model is divided. `metalens.training.Group` is one."""

    group: Any  # MLX's group. None = this process alone
    rank: int
    size: int

    def wait(self, arrays: Sequence[mx.array]) -> None:
        """Compute arrays that need messages of the other processes."""

    def all_gather(self, array: mx.array) -> mx.array:
        """Return the rows of all processes, by rank, evaluated."""

    def gather_json(self, value: Any) -> list[Any]:
        """Return a JSON value of every process, by rank."""

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes have the same facts."""

    def reporting_loss(self) -> AbstractContextManager[None]:
        """Return a context manager that says in an error of MLX's messages that another process has ended."""

    def together(self) -> AbstractContextManager[None]:
        """Return a context manager that lets an error of one process end all."""


@dataclass(frozen=True)
class Sharding:
    """How a model is divided.

    Attributes:
        processes: the processes that hold its parts.
        weights_hash: `metalens.models.weights.weights_hash` of the whole model.
    """

    processes: Processes
    weights_hash: str

    def require_same_ids(self, ids: mx.array) -> None:
        """Check that all processes read the same token ids: else sums over the group would mix different texts.

        Raises:
            InvalidValueError: in every process.
        """
        mine = np.array([*ids.shape, zlib.crc32(np.array(ids.astype(mx.int32)).tobytes())], np.uint32)
        everybody = np.array(self.processes.all_gather(mx.array(mine[None])))
        others = np.flatnonzero((everybody != everybody[0]).any(axis=1)).tolist()
        if others:
            raise InvalidValueError(
                f"Processes {others} read other token ids than process 0 ({everybody[:, :-1].tolist()} [sequences, tokens] in each). "
                "The processes of a divided model must read the same text: give all of them the same arguments."
            )

    def wait(self, arrays: Sequence[mx.array]) -> None:
        """Compute arrays of a forward pass at once: processes that use different ones would else send their messages in different orders."""
        self.processes.wait(arrays)

    def layers_of(self, layers: Sequence[L]) -> list[L]:
        """Return the layers whose lens this process computes."""
        return list(layers)[self.processes.rank :: self.processes.size]

    def gathered(self, array: np.ndarray) -> np.ndarray:
        """Return an array of float64, bit for bit, of which every process has computed some rows.

        Args:
            array: array [L, ...] with the rows of `layers_of(range(L))`.
        """
        size, rows = self.processes.size, self.layers_of(range(len(array)))
        mine = np.zeros((-(-len(array) // size), *array.shape[1:]))
        mine[: len(rows)] = array[rows]
        everything = np.array(self.processes.all_gather(mx.array(mine.view(np.uint32).reshape(len(mine), -1))))
        by_rank = everything.view(np.float64).reshape(size, *mine.shape)
        return np.stack([by_rank[layer % size, layer // size] for layer in range(len(array))])


def require_processes(value: Any) -> None:
    """Check that a `tensor_group` is what it must be (InvalidTypeError)."""
    if not all(hasattr(value, name) for name in ("group", "rank", "size", "wait")):
        raise InvalidTypeError(
            f"tensor_group must be a metalens.training.Group, not {type(value).__name__}: "
            "give Group.from_environment('layers'), or Group('layers', group)."
        )
