"""Trace one forward pass and keep its activations, as mlxterp's tutorials do."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from metalens.models.blocks import follow
from metalens.models.capture import Edit, ResidualCapture
from metalens.models.submodules import SubmoduleRecorder, named_place, submodule_name
from metalens.utils.errors import UnavailableError


class Traceable(Protocol):
    """The attributes of a model that a trace uses."""

    source: ResidualCapture
    _trace: Trace | None


class Output:
    """The output of a module inside a trace. `save()` returns the array. Attributes and indexing are those of the array."""

    def __init__(self, value: mx.array) -> None:
        self.value = value

    def save(self) -> mx.array:
        """Return the array, [B, T, D] for a block, to keep after the trace."""
        return self.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> mx.array:
        return self.value[index]


def latest_trace(model: Traceable) -> Trace:
    """Return the latest trace of a model (UnavailableError if there was none)."""
    if model._trace is None:
        raise UnavailableError("Nothing has been traced yet. Use `with model.trace(text): model.layers[i].output.save()`.")
    return model._trace


class ModuleProxy:
    """A block of the model, or a module inside it. Its `output` exists from the beginning of a trace to the beginning of the next one.

    Attributes and items are those of the module, to read and to set.

    Args:
        model: the model.
        index: number of the block.
        name: name of the module in the block; "" = the block itself.

    Attributes:
        index: as given.
    """

    def __init__(self, model: Traceable, index: int, name: str = "") -> None:
        self._model = model
        self.index = index
        self._name = name

    @property
    def module(self) -> nn.Module:
        """Return the module itself."""
        block: nn.Module = self._model.source.layers[self.index]
        found: nn.Module = follow(block, self._name) if self._name else block
        return found

    @property
    def output(self) -> Output:
        """Return the output of the module in the latest trace.

        Raises:
            UnavailableError: if there was no trace, or if the module did not run in it.
        """
        trace = latest_trace(self._model)
        value = trace.states.hidden[self.index] if not self._name else trace.module_outputs.get((self.index, self._name))
        if value is None:
            raise UnavailableError(f"{self._name} of block {self.index} did not run in the latest trace, or returned no array.")
        return Output(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        whole = f"{self._name}.{name}" if self._name else name
        found = submodule_name(self._model.source.layers[self.index], whole)
        return getattr(self.module, name) if found is None else ModuleProxy(self._model, self.index, found)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_model", "index", "_name"):
            object.__setattr__(self, name, value)
        elif isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"{name} of a module in a trace can only be read. To change an output, give trace interventions={{name: function}}.")
        else:
            setattr(self.module, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.module[key] = value

    def __contains__(self, key: object) -> bool:
        return key in self.module


class Trace:
    """The context manager that `InterpretableModel.trace` returns. The model runs at the start of the `with` block.

    Args:
        model: the model.
        ids: token ids [B, T].
        edits: {block, or name of a block or of a module inside one: function of its output that returns the output to use instead}.

    Attributes:
        activations: {"model.model.layers.0": [B, T, D], "model.model.layers.0.self_attn": [B, T, D], ..., "__model_output__": [B, T, V]}. Every
            module inside a block that ran is there.
        output: the logits [B, T, V].
        states: the hidden states.
        module_outputs: {(block, name of a module in it): its output}.
        saved_values: empty; mlxterp has this attribute.

    Raises:
        InvalidValueError: if there is no such block or module.
    """

    def __init__(self, model: Traceable, ids: mx.array, edits: Mapping[str | int, Edit]) -> None:
        self._model = model
        self._ids = ids
        self._edits = {named_place(key, model.source.layers): edit for key, edit in edits.items()}

    def __enter__(self) -> Trace:
        source = self._model.source
        of_blocks = {index: edit for (index, name), edit in self._edits.items() if not name}
        recorder = SubmoduleRecorder(source.layers, self._edits)
        with recorder.attached():
            self.states = source.capture(self._ids, of_blocks)
        self.output = self.states.logits
        self.module_outputs = recorder.outputs
        prefix = f"model.{source.path}"
        self.activations: dict[str, mx.array] = {f"{prefix}.{i}": h for i, h in enumerate(self.states.hidden)}
        self.activations |= {f"{prefix}.{i}.{name}": value for (i, name), value in recorder.outputs.items()}
        self.activations["__model_output__"] = self.output
        self.saved_values: dict[str, mx.array] = {}
        self._model._trace = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None
