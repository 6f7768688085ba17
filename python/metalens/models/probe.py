"""What a model calls outside its blocks: its embedding before the first one, its norm and head after the last.

Names differ from model to model, and a name that looks right may be a decoy. So the model is watched doing it: in one forward pass, which MLX only
records and never computes, every module notes when it is called, with what, and what it gives. Where one call's result is not what the next one gets,
the model does something in between that is not a module.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.models.capture import HiddenStates, ResidualCapture, as_it_is, follow, other_methods

# The ways in which mlx-lm's models call a module.
METHODS = ("__call__", "as_linear")

# Tokens of the forward pass that is watched.
PROBE_TOKENS = 8


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        path: of the module in the model, with dots.
        module: itself.
        method: "__call__", or "as_linear" of an embedding that is the head too.
        given: the first argument.
        result: what came back.
        depth: calls that it happened in, of those that began after the last block.
    """

    path: str
    module: nn.Module
    method: str
    given: Any
    result: Any
    depth: int


@dataclass(frozen=True)
class ModuleCalls:
    """The calls of one forward pass.

    Attributes:
        before: the first block, outermost first.
        after: the last block, in the order of their beginning: of a call in a call, the outer one first.
        stream: the pass itself.
    """

    before: list[ModuleCall]
    after: list[ModuleCall]
    stream: HiddenStates


def probe_modules(source: ResidualCapture, ids: mx.array) -> ModuleCalls:
    """Watch a forward pass on ids [B, T]. Nothing is computed until an array of it is used."""
    calls: list[tuple[int, ModuleCall]] = []  # with the number of blocks that had returned when it began
    blocks = _Count()
    with _noting(source, calls, blocks):
        stream = source.capture(ids, {i: blocks.passing for i in range(len(source))})
    return ModuleCalls([call for done, call in calls if done == 0], [call for done, call in calls if done == len(source)], stream)


class _Count:
    """Of the blocks that have returned; as an edit of their output it changes nothing."""

    def __init__(self) -> None:
        self.done = 0

    def passing(self, h: mx.array) -> mx.array:
        self.done += 1
        return h


@contextlib.contextmanager
def _noting(source: ResidualCapture, calls: list[tuple[int, ModuleCall]], blocks: _Count) -> Iterator[None]:
    """Make every module outside the blocks note its calls while the `with` block runs."""
    inside = {id(module) for block in source.layers for _, module in block.named_modules()}
    outside: dict[int, tuple[str, nn.Module]] = {}
    for path, module in source.model.named_modules():
        if id(module) not in inside and module is not source.model:
            outside.setdefault(id(module), (path, module))
    depth = 0

    def noted(original: type, method: str) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            place, began = len(calls), blocks.done
            given = as_it_is(args[0] if args else next(iter(kwargs.values()), None))
            unfinished = ModuleCall(outside[id(self)][0], self, method, given, None, depth)
            calls.append((began, unfinished))
            last = began == len(source)
            depth += last
            try:
                result = getattr(original, method)(self, *args, **kwargs)
            finally:
                depth -= last
            calls[place] = (began, ModuleCall(unfinished.path, self, method, given, as_it_is(result), unfinished.depth))
            return result

        return call

    def noting(original: type) -> dict[str, Callable[..., Any]]:
        return {method: noted(original, method) for method in METHODS if hasattr(original, method)}

    with other_methods((module for _, module in outside.values()), noting):
        yield


@dataclass(frozen=True)
class Overrides:
    """What the caller knows better: modules or dotted paths in place of what the model is seen to call, None for all else."""

    embedding: str | nn.Module | None = None
    norm: str | Callable[[mx.array], mx.array] | None = None
    head: str | nn.Module | None = None


@dataclass(frozen=True)
class FoundModule:
    """A module, and the dotted path where it was found ("(given)" for one that the caller gave)."""

    module: Any
    path: str


@dataclass(frozen=True)
class HeadModules:
    """What a model calls outside its blocks, None for what it does not call, and the pass in which it was seen.

    Attributes:
        embedding, norm, head: the caller's, else those that the model calls.
        norm_call: of the model's own norm, also where the caller named another one.
        head_call: of `head`; None if the model was not seen to call it.
        after: all calls after the last block.
        stream: the pass.
    """

    embedding: FoundModule | None
    norm: FoundModule | None
    head: FoundModule | None
    norm_call: ModuleCall | None
    head_call: ModuleCall | None
    after: list[ModuleCall]
    stream: HiddenStates

    def called(self) -> str:
        """What the model calls after its last block, for error messages."""
        return ", ".join(f"{call.path} ({type(call.module).__name__})" for call in self.after) or "no module at all"


def find_head_modules(source: ResidualCapture, places: Overrides) -> HeadModules:
    """Watch the model, and see what it calls outside its blocks. A path of the caller's that leads nowhere warns, as in mlxterp.

    Raises:
        ResidualStreamError: if its blocks do not run once each.
    """
    vocabulary = source.capture(mx.zeros((1, PROBE_TOKENS), mx.int32)).logits.shape[-1]
    trail = probe_modules(source, (mx.arange(PROBE_TOKENS) * vocabulary // PROBE_TOKENS)[None])
    head_call = _head_call(trail.after, vocabulary)
    norm_call = _norm_call(trail.after, head_call, trail.stream.hidden[-1].shape)
    embedding = _chosen(source.model, places.embedding, _embedding_call(trail.before), "embedding")
    norm = _chosen(source.model, places.norm, norm_call, "final norm")
    head = _chosen(source.model, places.head, head_call, "output head")
    seen = head_call if head is not None and head_call is not None and head.module is head_call.module else None
    return HeadModules(embedding, norm, head, norm_call, seen, trail.after, trail.stream)


def is_matrix(module: Any) -> bool:
    """Whether a module's "weight" is a matrix, or an adapter (LoRA) around one can be merged into it."""
    return isinstance(module, nn.Module) and (hasattr(module, "fuse") or ("weight" in module and module["weight"].ndim == 2))


def _head_call(after: list[ModuleCall], vocabulary: int) -> ModuleCall | None:
    """The outermost, latest call of a matrix that gives at least the vocabulary's columns."""
    found = [c for c in after if isinstance(c.result, mx.array) and c.result.shape[-1] >= vocabulary and is_matrix(c.module)]
    return min(reversed(found), key=lambda call: call.depth, default=None)


def _norm_call(after: list[ModuleCall], head: ModuleCall | None, shape: tuple[int, ...]) -> ModuleCall | None:
    """The outermost, first call that turns arrays of the stream's shape into such arrays; before the head's."""
    end = len(after) if head is None else next(i for i, call in enumerate(after) if call is head)
    found = [call for call in after[:end] if getattr(call.given, "shape", None) == getattr(call.result, "shape", None) == shape]
    return min(found, key=lambda call: call.depth, default=None)


def _embedding_call(before: list[ModuleCall]) -> ModuleCall | None:
    """The first call that turns ids into rows."""
    for call in before:
        given = call.given
        if is_matrix(call.module) and isinstance(given, mx.array) and mx.issubdtype(given.dtype, mx.integer):
            return call
    return None


def _chosen(model: nn.Module, override: Any, found: ModuleCall | None, what: str) -> FoundModule | None:
    """The caller's, else what was found."""
    if isinstance(override, str):
        module = follow(model, override)
        if module is not None:
            return FoundModule(module, override)
        warnings.warn(f"No {what} at the given path {override!r}; taking the one that the model calls instead.", UserWarning, stacklevel=6)
    elif override is not None:
        return FoundModule(override, "(given)")
    return None if found is None else FoundModule(found.module, found.path)
