"""Find the modules that a model calls outside its blocks: the embedding before the first block, the norm and the head after the last.

Names differ from model to model, and a module with the usual name may be unused. So the model is observed in one forward pass, which MLX
only records and never computes: every module outside the blocks records when it is called, with what input, and what it returns. Where the
output of one call is not the input of the next, the model does something in between that is not a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.models.blocks import follow
from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.models.observing import replaced_methods, snapshot
from metalens.utils.warn import warn_caller

# The ways in which mlx-lm's models call a module.
METHODS = ("__call__", "as_linear")

# The path of a module that the caller gave.
GIVEN = "(given)"

# Tokens of the forward pass that is observed.
PROBE_TOKENS = 8


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        path: the dotted path of the module in the model.
        module: the module.
        method: "__call__", or "as_linear" of an embedding that is also the head.
        input: the first argument.
        output: the result.
        began, ended: times, in steps of a clock that each beginning and each end advances.
    """

    path: str
    module: nn.Module
    method: str
    input: Any
    output: Any
    began: int
    ended: int

    def encloses(self, other: ModuleCall) -> bool:
        """Return whether the other call happened inside this one."""
        return self.began < other.began and other.ended < self.ended


@dataclass(frozen=True)
class ModuleCalls:
    """The calls of modules outside the blocks in one forward pass. Of a call inside a call, the outer one comes first.

    Attributes:
        before: the calls that began before the first block.
        after: the calls that began after the last block.
        states: hidden states and logits of the pass.
    """

    before: list[ModuleCall]
    after: list[ModuleCall]
    states: HiddenStates


def probe_modules(source: ResidualCapture, ids: mx.array) -> ModuleCalls:
    """Observe a forward pass on token ids [B, T]. MLX computes nothing until one of the arrays is used."""
    recorder = _Recorder(source)
    with recorder.attached():
        states = source.capture(ids)
    calls = sorted(recorder.calls, key=lambda call: call.began)
    blocks = [call for call in calls if recorder.is_block(call.module)]
    first, last = min(call.began for call in blocks), max(call.ended for call in blocks)
    return ModuleCalls([call for call in calls if call.began < first], [call for call in calls if call.began > last], states)


class _Recorder:
    """Records the calls of the blocks and of all modules outside them, but not of the modules inside the blocks."""

    def __init__(self, source: ResidualCapture) -> None:
        self.calls: list[ModuleCall] = []
        self.clock = count()
        self._blocks = {id(block) for block in source.layers}
        inside = {id(module) for block in source.layers for _, module in block.named_modules()} - self._blocks
        self._modules: dict[int, tuple[str, nn.Module]] = {}
        for path, module in source.model.named_modules():
            if id(module) not in inside and module is not source.model:
                self._modules.setdefault(id(module), (path, module))

    def is_block(self, module: nn.Module) -> bool:
        """Return whether a module is one of the model's blocks."""
        return id(module) in self._blocks

    def attached(self) -> AbstractContextManager[None]:
        """Return a context manager: inside it, the calls are recorded."""
        recorder = weakref.proxy(self)  # as in capture.py: classes live until the next garbage collection, the arrays must not

        def recording(original: type, method: str) -> Callable[..., Any]:
            def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return recorder.record(original, method, module, args, kwargs)

            return call

        return replaced_methods(
            [module for _, module in self._modules.values()],
            lambda original: {method: recording(original, method) for method in METHODS if hasattr(original, method)},
        )

    def record(self, original: type, method: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the original method of a module, and keep its input, its output and its time."""
        began = next(self.clock)
        first = snapshot(args[0] if args else next(iter(kwargs.values()), None))
        output = getattr(original, method)(module, *args, **kwargs)
        path, _ = self._modules[id(module)]
        self.calls.append(ModuleCall(path, module, method, first, snapshot(output), began, next(self.clock)))
        return output


@dataclass(frozen=True)
class Overrides:
    """Modules, or dotted paths of modules, to use instead of those that the model calls.

    Attributes:
        embedding: the embedding. None = the one that the model calls.
        norm: the final norm, or any function of [..., D]. None = the one that the model calls.
        head: the output head. None = the one that the model calls.
    """

    embedding: str | nn.Module | None = None
    norm: str | Callable[[mx.array], mx.array] | None = None
    head: str | nn.Module | None = None


@dataclass(frozen=True)
class FoundModule:
    """A module and its dotted path in the model. The path of a module that the caller gave is "(given)"."""

    module: Any
    path: str


@dataclass(frozen=True)
class HeadModules:
    """The modules that a model calls outside its blocks, and the pass in which they were observed.

    Attributes:
        embedding, norm, head: the override, or else the module that the model calls. None = there is none.
        embedding_call: the call of the model's own embedding, even if the embedding is overridden.
        norm_call: the call of the model's own norm, even if the norm is overridden.
        head_call: the call of `head`. None = the model did not call it.
        after: all calls after the last block.
        states: hidden states and logits of the pass.
    """

    embedding: FoundModule | None
    norm: FoundModule | None
    head: FoundModule | None
    embedding_call: ModuleCall | None
    norm_call: ModuleCall | None
    head_call: ModuleCall | None
    after: list[ModuleCall]
    states: HiddenStates

    def called(self) -> str:
        """Return a list, for error messages, of the modules that the model calls after its last block."""
        return ", ".join(f"{call.path} ({type(call.module).__name__})" for call in self.after) or "no module at all"


def find_head_modules(source: ResidualCapture, overrides: Overrides) -> HeadModules:
    """Observe the model, and find its embedding, final norm and head.

    An override whose path leads nowhere causes a UserWarning and is ignored, as in mlxterp.

    Raises:
        ResidualStreamError: if a block does not run exactly once.
    """
    tokens = min(PROBE_TOKENS, source.context or PROBE_TOKENS)
    vocabulary = source.capture(mx.zeros((1, tokens), mx.int32)).logits.shape[-1]
    calls = probe_modules(source, (mx.arange(tokens) * vocabulary // tokens)[None])
    head_call = _head_call(calls.after, vocabulary)
    norm_call = _norm_call(calls.after, head_call, calls.states.hidden[-1].shape)
    embedding_call = _embedding_call(calls.before)
    embedding = _choose(source.model, overrides.embedding, embedding_call, "embedding")
    norm = _choose(source.model, overrides.norm, norm_call, "final norm")
    head = _choose(source.model, overrides.head, head_call, "output head")
    uses_head_call = head is not None and head_call is not None and head.module is head_call.module
    return HeadModules(embedding, norm, head, embedding_call, norm_call, head_call if uses_head_call else None, calls.after, calls.states)


def is_matrix(module: Any) -> bool:
    """Return whether the "weight" of a module is a matrix, or the module is an adapter (LoRA) that can be merged into one."""
    return isinstance(module, nn.Module) and (hasattr(module, "fuse") or ("weight" in module and module["weight"].ndim == 2))


def _outermost(candidates: Sequence[ModuleCall], after: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the first of the candidates that the fewest of the calls after the last block enclose."""
    return min(candidates, key=lambda call: sum(other.encloses(call) for other in after), default=None)


def _head_call(after: list[ModuleCall], vocabulary: int) -> ModuleCall | None:
    """Return the outermost, latest call of a matrix whose output has at least `vocabulary` columns."""
    found = [c for c in after if isinstance(c.output, mx.array) and c.output.shape[-1] >= vocabulary and is_matrix(c.module)]
    return _outermost(found[::-1], after)


def _norm_call(after: list[ModuleCall], head: ModuleCall | None, shape: tuple[int, ...]) -> ModuleCall | None:
    """Return the outermost, first call before the head whose input and output have the shape of the hidden states."""
    candidates = [call for call in after if head is None or call.began < head.began]
    found = [call for call in candidates if getattr(call.input, "shape", None) == getattr(call.output, "shape", None) == shape]
    return _outermost(found, after)


def _embedding_call(before: list[ModuleCall]) -> ModuleCall | None:
    """Return the first call of a matrix whose input is token ids."""
    for call in before:
        if is_matrix(call.module) and isinstance(call.input, mx.array) and mx.issubdtype(call.input.dtype, mx.integer):
            return call
    return None


def _choose(model: nn.Module, override: Any, found: ModuleCall | None, what: str) -> FoundModule | None:
    """Return the overriding module, or else the module that the model calls."""
    if isinstance(override, str):
        module = follow(model, override)
        if module is not None:
            return FoundModule(module, override)
        warn_caller(f"No {what} at the given path {override!r}; taking the one that the model calls instead.")
    elif override is not None:
        return FoundModule(override, GIVEN)
    return None if found is None else FoundModule(found.module, found.path)
