"""Trace one forward pass and keep its activations, as mlxterp's tutorials do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import mlx.core as mx

from metalens.models.capture import Edit, ResidualCapture
from metalens.utils.errors import InvalidValueError, UnavailableError


class Traceable(Protocol):
    """The attributes of a model that a trace uses."""

    source: ResidualCapture
    _trace: Trace | None


class Output:
    """The output of a block inside a trace. `save()` returns the array. Attributes and indexing are those of the array."""

    def __init__(self, value: mx.array) -> None:
        self.value = value

    def save(self) -> mx.array:
        """Return the array [B, T, D], to keep after the trace."""
        return self.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> mx.array:
        return self.value[index]


class LayerProxy:
    """One block of the model. Its `output` exists from the beginning of a trace to the beginning of the next one."""

    def __init__(self, model: Traceable, index: int) -> None:
        self._model = model
        self.index = index

    @property
    def output(self) -> Output:
        """Return the output of the block in the latest trace (UnavailableError if there was none)."""
        trace = self._model._trace
        if trace is None:
            raise UnavailableError("Nothing has been traced yet. Use `with model.trace(text): model.layers[i].output.save()`.")
        return Output(trace.states.hidden[self.index])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model.source.layers[self.index], name)


class Trace:
    """The context manager that `InterpretableModel.trace` returns. The model runs at the start of the `with` block.

    Args:
        model: the model.
        ids: token ids [B, T].
        edits: {block: function of its output [B, T, D] that returns the output to use instead}.

    Attributes:
        activations: {"model.model.layers.0": [B, T, D], ..., "__model_output__": [B, T, V]}.
        output: the logits [B, T, V].
        states: the hidden states.
        saved_values: empty; mlxterp has this attribute.
    """

    def __init__(self, model: Traceable, ids: mx.array, edits: Mapping[int, Edit]) -> None:
        self._model = model
        self._ids = ids
        self._edits = edits

    def __enter__(self) -> Trace:
        self.states = self._model.source.capture(self._ids, self._edits)
        self.output = self.states.logits
        prefix = f"model.{self._model.source.path}"
        self.activations: dict[str, mx.array] = {f"{prefix}.{i}": h for i, h in enumerate(self.states.hidden)}
        self.activations["__model_output__"] = self.output
        self.saved_values: dict[str, mx.array] = {}
        self._model._trace = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def layer_index(key: str | int, num_layers: int) -> int:
    """Return the index of a block.

    Args:
        key: the index, or a name that ends in layers.<i>, h.<i> or blocks.<i>.
        num_layers: the number of blocks.

    Raises:
        InvalidValueError: if there is no such block.
    """
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$", key) if isinstance(key, str) else None
    index = key if isinstance(key, int) else int(match[1]) if match else -1
    if not 0 <= index < num_layers:
        raise InvalidValueError(f"No block {key!r} to intervene on: give an index from 0 to {num_layers - 1}, or a name that ends in layers.<index>.")
    return index
