"""Run a model whose blocks have changed places, permuted or one in the place of another, or whose first block reads another input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.nn as nn

from metalens.models.capture import Edit, ResidualStreamError, residual_stream_in
from metalens.models.observing import replaced_methods
from metalens.utils.errors import InvalidValueError


@contextlib.contextmanager
def reordered_blocks(blocks: Sequence[nn.Module], order: Sequence[int]) -> Iterator[None]:
    """Let every block compute what another one computes, inside a `with` block.

    The model's own code runs unchanged: it gives a place its masks and positions, and the block that computes there gets them. So a block
    with a sliding window gets the mask of the place, not its own. Do not use a cache: a cache belongs to a place.

    Args:
        blocks: the blocks of the model, in their order.
        order: for each place the index of the block that computes there. [0, 1, 2] changes nothing, [1, 0, 2] permutes the first two blocks,
            [0, 0, 2] puts block 0 in the place of block 1 too.

    Raises:
        InvalidValueError: if `order` has another length, or an index is no block.
    """
    if len(order) != len(blocks) or not all(0 <= index < len(blocks) for index in order):
        raise InvalidValueError(f"The order of {len(blocks)} blocks has one index from 0 to {len(blocks) - 1} for each of them, got {list(order)}.")
    # The class that computes is that from before the replacement: the present class of a block is the one that looks up the order.
    computes = {id(place): (blocks[index], type(blocks[index])) for place, index in zip(blocks, order, strict=True)}

    def looking_up(original: type) -> dict[str, Callable[..., Any]]:
        def call(place: nn.Module, *args: Any, **kwargs: Any) -> Any:
            block, kind = computes[id(place)]
            return kind.__call__(block, *args, **kwargs)

        return {"__call__": call}

    with replaced_methods(blocks, looking_up):
        yield


@contextlib.contextmanager
def edited_input(block: nn.Module, edit: Edit) -> Iterator[None]:
    """Let a block read an edited residual stream, inside a `with` block. For block 0 this edits the embedding's output.

    Args:
        block: the block.
        edit: a function of the block's input [B, T, D] that returns the input to use instead.

    Raises:
        ResidualStreamError: when the block is called without a residual stream [B, T, D].
    """

    def editing(original: type) -> dict[str, Callable[..., Any]]:
        def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stream = residual_stream_in([*args, *kwargs.values()])
            if stream is None:
                raise ResidualStreamError("The block is called without a residual stream [B, T, D], so its input can't be edited.")
            edited = edit(stream)
            args = tuple(edited if value is stream else value for value in args)
            return original.__call__(block, *args, **{name: edited if value is stream else value for name, value in kwargs.items()})

        return {"__call__": call}

    with replaced_methods([block], editing):
        yield
