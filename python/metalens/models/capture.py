"""Residual streams: every block's output, from one forward pass of any decoder of mlx-lm's kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError, MetalensError

# Where models keep their blocks, in the order tried. `{}` is the attribute's name, "layers" unless the caller says otherwise.
LAYER_PATHS = ("{}", "model.{}", "language_model.model.{}", "model.language_model.{}", "backbone.{}", "transformer.{}")
ALTERNATIVE_NAMES = ("layers", "h", "blocks")


class ResidualStreamError(MetalensError, RuntimeError):
    """The model's blocks do not hand on one residual stream each."""


Edit = Callable[[mx.array], mx.array]


def follow(root: Any, path: str) -> Any:
    """The attribute at a dotted path (numbers index lists), or None if it is not there."""
    for name in path.split("."):
        if name.isdigit() and isinstance(root, (list, tuple)):
            root = root[int(name)] if int(name) < len(root) else None
        else:
            root = getattr(root, name, None)
        if root is None:
            return None
    return root


def find_layers(model: Any, layer_attr: str = "layers") -> tuple[str, Sequence[nn.Module]]:
    """The model's blocks and the dotted path at which they were found.

    Raises:
        AttributeError: listing the paths tried, if there is none.
    """
    names = [layer_attr, *(ALTERNATIVE_NAMES if layer_attr == "layers" else ())]
    tried = [pattern.format(name) for name in dict.fromkeys(names) for pattern in LAYER_PATHS]
    for path in tried:
        found = follow(model, path)
        if isinstance(found, (list, tuple)) and len(found) > 0:
            # mlx-lm's models offer `layers` as a property; the real place, which is deeper, gives the names that other tools show.
            places = [pattern.format(name) for name in dict.fromkeys([*names, *ALTERNATIVE_NAMES]) for pattern in LAYER_PATHS]
            return max((place for place in places if _same(follow(model, place), found)), key=lambda place: place.count(".")), found
    raise AttributeError(f"Could not find layers attribute. Tried: {tried}. Specify the correct path with layer_attr parameter.")


def _same(a: Any, b: Any) -> bool:
    """Whether two lists hold the same modules; a property may build a new list each time."""
    return isinstance(a, (list, tuple)) and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class HiddenStates:
    """What one forward pass left behind.

    Attributes:
        hidden: the output of block i at index i, [B, T, D] each.
        logits: [B, T, V], the model's own. Lazy like everything in MLX: it costs nothing unless it is used.
        mask: [B, T], false for padding; None = there is none.
    """

    hidden: list[mx.array]
    logits: mx.array
    mask: mx.array | None = None

    def rows(self, layer: int) -> mx.array:
        """A block's output at all tokens [N, D], padding left out."""
        h = self.hidden[layer]
        h = h.reshape(-1, h.shape[-1])
        return h if self.mask is None else h[mx.array(np.flatnonzero(np.array(self.mask)))]

    def of_sequences(self, which: slice) -> HiddenStates:
        """The part of some of the B sequences."""
        return HiddenStates([h[which] for h in self.hidden], self.logits[which], None if self.mask is None else self.mask[which])


class ResidualCapture:
    """Captures residual streams of one model.

    For the length of one call each block's class is exchanged for a subclass that notes what the block returns, so the model's own code runs as it
    is, with the attributes it looks up on its blocks, and nothing is left behind. One thread at a time may use a model.

    Args:
        model: the language model, called as `model(ids)`.
        layer_attr: name or dotted path of the list of blocks.
    """

    def __init__(self, model: nn.Module, layer_attr: str = "layers") -> None:
        self.model = model
        self.path, self.layers = find_layers(model, layer_attr)

    def __len__(self) -> int:
        """L: the number of blocks."""
        return len(self.layers)

    def capture(self, ids: mx.array, edits: Mapping[int, Edit] | None = None, mask: mx.array | None = None) -> HiddenStates:
        """Run the model on ids [B, T] and keep every block's output.

        Args:
            ids: token ids [B, T].
            edits: for some blocks, what to put in place of their output: f([B, T, D]) -> [B, T, D].
            mask: [B, T], true for tokens and false for padding; None = no padding. Padding follows its sequence's tokens: a causal model computes
                these as if it were not there, without being told.

        Raises:
            ValueError: if the mask is of another shape, or a token follows padding.
            ResidualStreamError: if a block was not run exactly once, in which case no stream can be named.
        """
        if mask is not None:
            _require_padding_at_the_end(mask, ids)
        return self._capture(ids, edits or {}, mask)

    def chunks(self, ids: mx.array, tokens: int) -> Iterator[HiddenStates]:
        """The streams of long sequences, part after part, so that no more than a part's are in memory.

        The model keeps its keys and values (or its state) in its own cache, as it does when it generates: the parts together are what one pass over
        everything gives, to rounding.

        Args:
            ids: token ids [B, T].
            tokens: per part and sequence; the last part may be shorter.

        Raises:
            ValueError: if `tokens` is not positive.
            ResidualStreamError: as `capture`.
        """
        if tokens < 1:
            raise InvalidValueError(f"tokens must be at least 1, got {tokens}.")
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        for start in range(0, ids.shape[1], tokens):
            stream = self._capture(ids[:, start : start + tokens], {}, None, cache=cache)
            yield stream
            mx.eval([part.state for part in cache])  # else the next part would hold this one's whole graph

    def _capture(self, ids: mx.array, edits: Mapping[int, Edit], mask: mx.array | None, **how: Any) -> HiddenStates:
        seen: list[list[mx.array]] = [[] for _ in self.layers]
        with _watched(self.layers, seen, edits):
            logits = self.model(ids, **how)
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        wrong = [i for i, outputs in enumerate(seen) if len(outputs) != 1]
        if wrong:
            raise ResidualStreamError(
                f"Blocks {wrong} ran {[len(seen[i]) for i in wrong]} times in one forward pass; exactly once is needed to name its stream."
            )
        hidden = [outputs[0] for outputs in seen]
        for outputs in seen:  # the watching classes form a cycle that holds these lists until Python's collector comes round
            outputs.clear()
        return HiddenStates(hidden, logits, mask)


def _require_padding_at_the_end(mask: mx.array, ids: mx.array) -> None:
    if mask.shape != ids.shape:
        raise InvalidValueError(f"The mask must be {ids.shape}, as the ids are; it is {mask.shape}.")
    real = mask.astype(mx.int32)
    if to_float(mx.any(real[:, 1:] > real[:, :-1])):
        raise InvalidValueError("A token follows padding. Put padding at the end of its sequence: before it, it would change what the model sees.")


def as_it_is(value: Any) -> Any:
    """An array that stays when a model goes on to change this one in place; anything else as it is."""
    return mx.stop_gradient(value) if isinstance(value, mx.array) else value


@contextlib.contextmanager
def other_methods(modules: Iterable[nn.Module], methods_for: Callable[[type], Mapping[str, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other methods while the `with` block runs: each one's class is exchanged for a subclass of the same name.

    Args:
        modules: which ones.
        methods_for: {name: method} in place of a class's own; called once for each class.
    """
    originals = [(module, type(module)) for module in modules]
    subclasses: dict[type, type] = {}
    try:
        for module, original in originals:
            if original not in subclasses:
                subclasses[original] = type(original.__name__, (original,), {**methods_for(original), "__module__": original.__module__})
            module.__class__ = subclasses[original]
        yield
    finally:
        for module, original in originals:
            module.__class__ = original


@contextlib.contextmanager
def _watched(layers: Sequence[nn.Module], seen: list[list[mx.array]], edits: Mapping[int, Edit]) -> Iterator[None]:
    """Make every block append its output to its list in `seen` while the `with` block runs."""
    index = {id(layer): i for i, layer in enumerate(layers)}

    def watching(original: type) -> dict[str, Callable[..., Any]]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            i = index[id(self)]
            output = original.__call__(self, *args, **kwargs)
            several = isinstance(output, (tuple, list))
            hidden = output[0] if several else output
            if i in edits:
                hidden = edits[i](hidden)
                output = type(output)([hidden, *output[1:]]) if several else hidden
            seen[i].append(as_it_is(hidden))
            return output

        return {"__call__": call}

    with other_methods(layers, watching):
        yield
