"""trace: one forward pass whose activations stay at hand, as mlxterp's tutorials use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import mlx.core as mx

from metalens.models.capture import Edit, ResidualCapture
from metalens.utils.errors import InvalidValueError, UnavailableError


class Traceable(Protocol):
    """What a trace needs of a model."""

    source: ResidualCapture
    _trace: Trace | None


class Output:
    """A block's output inside a trace. `save()` returns the array; attributes and indexing reach through to it."""

    def __init__(self, value: mx.array) -> None:
        self.value = value

    def save(self) -> mx.array:
        """The array [B, T, D], to keep after the trace."""
        return self.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> mx.array:
        return self.value[index]


class LayerProxy:
    """One block of the model; its `output` exists inside a trace and after it, until the next one."""

    def __init__(self, model: Traceable, index: int) -> None:
        self._model = model
        self.index = index

    @property
    def output(self) -> Output:
        """What the block returned in the latest trace."""
        trace = self._model._trace
        if trace is None:
            raise UnavailableError("Nothing has been traced yet. Use `with model.trace(text): model.layers[i].output.save()`.")
        return Output(trace.stream.hidden[self.index])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model.source.layers[self.index], name)


class Trace:
    """The context manager that `InterpretableModel.trace` returns."""

    def __init__(self, model: Traceable, ids: mx.array, edits: Mapping[int, Edit]) -> None:
        self._model = model
        self._ids = ids
        self._edits = edits

    def __enter__(self) -> Trace:
        self.stream = self._model.source.capture(self._ids, self._edits)
        self.output = self.stream.logits
        prefix = f"model.{self._model.source.path}"
        self.activations: dict[str, mx.array] = {f"{prefix}.{i}": h for i, h in enumerate(self.stream.hidden)}
        self.activations["__model_output__"] = self.output
        self.saved_values: dict[str, mx.array] = {}
        self._model._trace = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def layer_index(key: str | int, num_layers: int) -> int:
    """Return the index of the block that an intervention names: an index, or a name that ends in layers.<i>."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$", key) if isinstance(key, str) else None
    index = key if isinstance(key, int) else int(match[1]) if match else -1
    if not 0 <= index < num_layers:
        raise InvalidValueError(f"No block {key!r} to intervene on: give an index from 0 to {num_layers - 1}, or a name that ends in layers.<index>.")
    return index
