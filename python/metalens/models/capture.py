"""Capture hidden states: the output of every block, from one forward pass of any decoder of mlx-lm's kind."""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.models.blocks import LAYER_NAMES, find_layers
from metalens.models.context import context_of, learned_positions
from metalens.models.layers import EMBEDDING, Layer
from metalens.models.observing import replaced_methods, snapshot
from metalens.models.sharding import Sharding
from metalens.ops.sums import run_sums_natively
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError, MetalensError
from metalens.utils.forked import require_own_threads
from metalens.utils.warn import warn_caller


class ResidualStreamError(MetalensError, RuntimeError):
    """The blocks of the model do not each return one residual stream."""


class EmbeddingStreamError(ResidualStreamError):
    """The input of block 0 is not the residual stream after the embedding."""


class ContextError(InvalidValueError):
    """A sequence is longer than the model's table of positions."""


# A function of a block's output [B, T, D] that returns the output to use instead.
Edit = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class BlockEdit:
    """An edit of a block's output that also needs the block's input: an edit of what the block adds to the residual stream.

    Attributes:
        function: a function of the block's input and output, [B, T, D] each, that returns the output to use instead. No gradient flows
            through the input that it gets.
    """

    function: Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states and logits of one forward pass.

    Attributes:
        hidden: the output of each block, [B, T, D]; block i is at index i.
        logits: the model's own logits, [B, T, V]. They are lazy, so they cost nothing unless they are used.
        mask: [B, T], true for the tokens that count: false for padding, and for those that take no part in a loss. None = all count.
        embedding: the input of block 0, [B, T, D], if it was asked for.
        ids: token ids [B, T] of the pass.
    """

    hidden: list[mx.array]
    logits: mx.array
    mask: mx.array | None = None
    embedding: mx.array | None = None
    ids: mx.array | None = None

    @cached_property
    def counted_tokens(self) -> mx.array | None:
        """Return the numbers of the tokens that count, [N], None if all do."""
        return None if self.mask is None else mx.array(np.flatnonzero(np.array(self.mask)))

    @property
    def num_rows(self) -> int:
        """Return N, the number of tokens that count."""
        return int(self.counted_tokens.size if self.counted_tokens is not None else math.prod(self.hidden[-1].shape[:-1]))

    def of(self, layer: Layer) -> mx.array:
        """Return the output [B, T, D] of a block, by its number, negative from the end, or of the embedding.

        Raises:
            ResidualStreamError: if the embedding was not captured.
        """
        if layer != EMBEDDING:
            return self.hidden[layer]
        if self.embedding is None:
            raise ResidualStreamError("The embedding's output was not captured: capture with with_embedding=True.")
        return self.embedding

    def rows(self, layer: Layer, at: mx.array | None = None) -> mx.array:
        """Return the output of a block, or of the embedding, at the tokens that count, [N, D].

        Args:
            layer: as in `of`, which raises the errors.
            at: [N] numbers of the tokens to return instead, counted through all B T.
        """
        h = self.of(layer)
        h, chosen = h.reshape(-1, h.shape[-1]), self.counted_tokens if at is None else at
        return h if chosen is None else h[chosen]

    def of_sequences(self, which: slice) -> HiddenStates:
        """Return the part that belongs to some of the B sequences."""
        mask, embedding, ids = (None if part is None else part[which] for part in (self.mask, self.embedding, self.ids))
        return HiddenStates([h[which] for h in self.hidden], self.logits[which], mask, embedding, ids)

    def of_tokens(self, which: mx.array) -> HiddenStates:
        """Return the tokens with the given numbers [N], counted through all B T, as one sequence [1, N]. All of them count."""

        def chosen(part: mx.array) -> mx.array:
            return mx.flatten(part, 0, 1)[which][None]

        embedding, ids = (None if part is None else chosen(part) for part in (self.embedding, self.ids))
        return HiddenStates([chosen(h) for h in self.hidden], chosen(self.logits), None, embedding, ids)


def joined(passes: list[HiddenStates]) -> HiddenStates:
    """Return the tokens that count of some passes, one after the other, as one sequence [1, N], without logits: their V is 0.

    It empties the passes layer by layer, so that a layer's hidden states are in memory twice only while they are copied. Logits, which are lazy,
    would keep those of the last one.

    Args:
        passes: at least one pass. They have the same layers, and all or none the embedding and the token ids.
    """
    numbers = [each.counted_tokens for each in passes]

    def together(parts: list[mx.array]) -> mx.array:
        rows = [mx.flatten(part, 0, 1) for part in parts]
        return mx.concatenate([row if at is None else row[at] for row, at in zip(rows, numbers, strict=True)])[None]

    ids = [each.ids for each in passes if each.ids is not None]
    embedding = [each.embedding for each in passes if each.embedding is not None]
    hidden: list[mx.array] = []
    for _ in range(len(passes[0].hidden)):
        hidden.append(together([each.hidden.pop(0) for each in passes]))
        mx.eval(hidden[-1])
    no_logits = mx.zeros((*hidden[0].shape[:2], 0))
    return HiddenStates(hidden, no_logits, None, together(embedding) if embedding else None, together(ids) if ids else None)


class ResidualCapture:
    """Captures the residual stream of one model, after each block.

    During a call, the class of each block is replaced by a subclass that records the output of the block. The model's own code runs
    unchanged, finds the attributes that it looks up on its blocks, and is left as it was. Only one thread at a time may use a model.

    Args:
        model: the language model, called as `model(ids)`.
        layer_attr: the name or dotted path of the list of blocks.
        sharding: how the model is divided among processes. None = this process has all of it.

    Attributes:
        model, sharding: as given.
        layers: blocks of the model.
        path: the dotted path of the list of blocks.

    Raises:
        LayersNotFoundError: if no list of blocks is found.
    """

    def __init__(self, model: nn.Module, layer_attr: str = LAYER_NAMES[0], sharding: Sharding | None = None) -> None:
        self.model, self.sharding = model, sharding
        self.path, self.layers = find_layers(model, layer_attr)
        self._told_of_length = False

    def __len__(self) -> int:
        """Return L, the number of blocks."""
        return len(self.layers)

    @cached_property
    def position_limit(self) -> int | None:
        """Return the tokens that the model's table of learned positions has room for. None = the model has no such table."""
        return learned_positions(self.model, self.layers)

    @property
    def context(self) -> int | None:
        """Return the tokens per sequence that the model was made for. None = neither a table of positions nor the configuration says it."""
        return self.position_limit or context_of(self.model)

    def require_length(self, tokens: int) -> None:
        """Check that the model can read a sequence. Warn once if it was trained on shorter ones.

        Raises:
            ContextError: if the sequence is longer than the table of positions: MLX would read other memory.
        """
        limit = self.position_limit
        if limit is not None and tokens > limit:
            raise ContextError(
                f"The model's context is {limit} tokens: it has no positions for a sequence of {tokens}. "
                f"Give a shorter text, or cut it into sequences of at most {limit} tokens (max_seq_len)."
            )
        context = None if self._told_of_length else self.context
        if context is not None and tokens > context:
            self._told_of_length = True
            warn_caller(
                f"A sequence of {tokens} tokens is longer than the model's context of {context}: the model was not trained for what comes after "
                "it, and its predictions there may be poor."
            )

    def capture(
        self, ids: mx.array, edits: Mapping[int, Edit | BlockEdit] | None = None, mask: mx.array | None = None, *, with_embedding: bool = False
    ) -> HiddenStates:
        """Run the model on token ids and keep the output of every block.

        Args:
            ids: token ids [B, T].
            edits: {block: function of its output [B, T, D] that returns the output to use instead, or a `BlockEdit`}. An edit sees what the
                edits of earlier blocks have left.
            mask: [B, T], true for tokens and false for padding; None = no padding. Padding must follow the tokens of its sequence. A causal
                model then computes the tokens as if there were no padding, so the model does not need the mask.
            with_embedding: also keep the input of block 0.

        Raises:
            InvalidValueError: if the mask has another shape than the ids, a token follows padding, or the model is divided and its processes read
                different ids.
            ResidualStreamError: if a block did not run exactly once, because then its output is not defined.
            ContextError: if the model has no positions for as many tokens.
            UnavailableError: if the model is divided and another process has ended.
        """
        self.require_length(ids.shape[-1])
        if mask is not None:
            _require_padding_at_the_end(mask, ids)
        return self._capture(ids, edits or {}, mask, with_embedding)

    @cached_property
    def takes_cache(self) -> bool:
        """Return whether the model can go on from a cache, as mlx-lm's models can: whether it has an argument `cache`."""
        return "cache" in inspect.signature(self.model.__call__).parameters

    def new_cache(self) -> list[Any]:
        """Return an empty cache of the model's own kind: one entry for each block."""
        from mlx_lm.models.cache import make_prompt_cache

        cache: list[Any] = make_prompt_cache(self.model)
        return cache

    def capture_next(
        self,
        ids: mx.array,
        cache: list[Any],
        *,
        edits: Mapping[int, Edit | BlockEdit] | None = None,
        with_embedding: bool = False,
        last_block: int | None = None,
    ) -> HiddenStates:
        """Capture the tokens that follow those in a cache, which takes them in.

        Args:
            ids: token ids [B, T].
            cache: the result of `new_cache`, with the tokens before.
            edits: as in `capture`.
            with_embedding: also keep the input of block 0.
            last_block: stop after this block: no later block runs, nor does the head, and their entries of the cache stay empty. The result
                has `hidden` up to this block, and its `logits` have no elements. None = run the model.

        Raises:
            ResidualStreamError: as in `capture`.
        """
        return self._capture(ids, edits or {}, None, with_embedding, last_block, cache=cache)

    def chunks(self, ids: mx.array, tokens: int, *, with_embedding: bool = False) -> Iterator[HiddenStates]:
        """Capture long sequences in chunks, so that only one chunk is in memory at a time.

        The model keeps its keys and values (or its state) in its own cache, as it does when it generates text. All chunks together equal
        one pass over the whole, within rounding.

        Args:
            ids: token ids [B, T].
            tokens: tokens per chunk and sequence. The last chunk may be shorter.
            with_embedding: also keep the input of block 0.

        Raises:
            InvalidValueError: if `tokens` is not positive.
            ResidualStreamError, ContextError: as in `capture`.
        """
        self.require_length(ids.shape[-1])
        if tokens < 1:
            raise InvalidValueError(f"tokens must be at least 1, got {tokens}.")
        cache = self.new_cache()
        for start in range(0, ids.shape[1], tokens):
            yield self.capture_next(ids[:, start : start + tokens], cache, with_embedding=with_embedding)
            mx.eval([part.state for part in cache])  # else the next chunk would hold the whole graph of this one

    def _capture(
        self,
        ids: mx.array,
        edits: Mapping[int, Edit | BlockEdit],
        mask: mx.array | None,
        with_embedding: bool = False,
        last_block: int | None = None,
        **options: Any,
    ) -> HiddenStates:
        require_own_threads()
        if self.sharding is not None:
            self.sharding.require_same_ids(ids)
        recorder = _Recorder(self.layers, edits, last_block)
        logits: Any = mx.zeros((*ids.shape, 0))
        with recorder.attached(), contextlib.suppress(_LastBlock):
            logits = self.model(ids, **options)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        hidden = recorder.hidden()
        run_sums_natively([*hidden, logits])
        if self.sharding is not None:
            self.sharding.wait(hidden)
        return HiddenStates(hidden, logits, mask, recorder.embedding() if with_embedding else None, ids)


def residual_stream_in(values: Iterable[Any]) -> mx.array | None:
    """Return the residual stream among the arguments of a block: the first float array [B, T, D]. None = there is none."""
    return next((v for v in values if isinstance(v, mx.array) and v.ndim == 3 and mx.issubdtype(v.dtype, mx.floating)), None)


def _edited(edit: Edit | BlockEdit, given: mx.array | None, hidden: mx.array, block: int) -> mx.array:
    """Return the output of a block after its edit (ResidualStreamError if the edit needs an input that is no residual stream)."""
    if not isinstance(edit, BlockEdit):
        return edit(hidden)
    if given is None or given.shape != hidden.shape:
        raise ResidualStreamError(f"The input of block {block} is no residual stream [B, T, D], so what the block adds to it can't be edited.")
    return edit.function(given, hidden)


def _require_padding_at_the_end(mask: mx.array, ids: mx.array) -> None:
    if mask.shape != ids.shape:
        raise InvalidValueError(f"The mask must be {ids.shape}, like the ids; it is {mask.shape}.")
    real = mask.astype(mx.int32)
    if to_float(mx.any(real[:, 1:] > real[:, :-1])):
        raise InvalidValueError(
            "A token follows padding. Put padding at the end of its sequence: padding before a token changes what the model sees."
        )


class _LastBlock(Exception):  # noqa: N818 (no error: the end of a pass that stops early)
    """Leaves the model's forward pass after the last block that is wanted."""


class _Recorder:
    """Records, and edits, the outputs of the blocks during one forward pass."""

    def __init__(self, layers: Sequence[nn.Module], edits: Mapping[int, Edit | BlockEdit], last_block: int | None = None) -> None:
        self.layers = layers if last_block is None else layers[: last_block + 1]
        self.edits = edits
        self.last_block = last_block
        self.input: mx.array | None = None
        self.outputs: list[list[mx.array]] = [[] for _ in self.layers]
        self._index = {id(layer): i for i, layer in enumerate(self.layers)}

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: inside it, every call of a block is recorded."""
        # A class belongs to a reference cycle. A strong reference in its methods would keep the arrays until the next garbage collection.
        recorder = weakref.proxy(self)

        def recording(original: type) -> dict[str, Callable[..., Any]]:
            def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
                given = recorder.record_input(block, *args, *kwargs.values())
                return recorder.record(block, original.__call__(block, *args, **kwargs), given)

            return {"__call__": call}

        return replaced_methods(self.layers, recording)

    def record_input(self, block: nn.Module, *values: Any) -> mx.array | None:
        """Return the residual stream before a block, if it is needed, and keep that before block 0."""
        i = self._index[id(block)]
        if i > 0 and not isinstance(self.edits.get(i), BlockEdit):
            return None
        given: mx.array | None = snapshot(residual_stream_in(values))
        if i == 0:
            self.input = given
        return given

    def embedding(self) -> mx.array:
        """Return the input of block 0 (EmbeddingStreamError if it was not seen, or has another shape than the block's output)."""
        if self.input is None or self.input.shape != self.outputs[0][0].shape:
            raise EmbeddingStreamError("The input of block 0 is no residual stream [B, T, D], so the embedding of this model can't be read.")
        return self.input

    def record(self, block: nn.Module, output: Any, given: mx.array | None) -> Any:
        """Keep the hidden state in the output of a block, whose input was `given`. Return the output, edited if there is an edit."""
        i = self._index[id(block)]
        has_more = isinstance(output, (tuple, list))
        hidden = output[0] if has_more else output
        if i in self.edits:
            hidden = _edited(self.edits[i], given, hidden, i)
            output = type(output)([hidden, *output[1:]]) if has_more else hidden
        self.outputs[i].append(snapshot(hidden))
        if i == self.last_block:
            raise _LastBlock
        return output

    def hidden(self) -> list[mx.array]:
        """Return the output of each block (ResidualStreamError if a block did not run exactly once)."""
        wrong = [i for i, outputs in enumerate(self.outputs) if len(outputs) != 1]
        if wrong:
            raise ResidualStreamError(
                f"Blocks {wrong} ran {[len(self.outputs[i]) for i in wrong]} times in one forward pass; "
                "exactly once is needed to know the output of a block."
            )
        return [outputs[0] for outputs in self.outputs]
