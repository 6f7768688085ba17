"""Where the rows of a trajectory come from: one text, read by one model through one lens, in parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens
from metalens.models.capture import HiddenStates
from metalens.models.language_model import LanguageModel
from metalens.models.unembed import NormFunction
from metalens.ops import Head
from metalens.readings.numbering import EMBEDDING, Layer
from metalens.readings.rows import lens_rows
from metalens.utils.errors import InvalidValueError

# Bytes of float32 rows [R, T, D] and captured hidden states [L, T, D] that are in memory at a time; a longer text is read in parts.
ROWS_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class RowSource:
    """A text with the model and the lens that read it.

    Attributes:
        model: the model.
        ids: token ids [1, T] of the whole text.
        lens: the lens.
        norm: the final norm of the lens's rows.
        layers: rows to read, R in number.
        positions: positions to read, a range with step 1.
        mask_input: rule out the tokens of the text in every prediction.
    """

    model: LanguageModel
    ids: mx.array
    lens: Lens
    norm: NormFunction
    layers: tuple[Layer, ...]
    positions: range
    mask_input: bool = False

    @property
    def head(self) -> Head:
        """Return the model's head; with mask_input, the one that predicts no token of the text."""
        head = self.model.unembed.head
        return without(head, self.ids) if self.mask_input else head

    def rows(self, states: HiddenStates, where: slice) -> mx.array:
        """Return the rows [R, c, D] of some positions of captured hidden states. Lazy."""
        hidden = {layer: states.of(layer)[0, where] for layer in self.layers}
        return lens_rows(hidden, self.layers, self.lens, self.norm).astype(mx.float32)

    def select(self, layers: Sequence[Layer], positions: range) -> RowSource:
        """Return the source of some of the layers and positions."""
        return replace(self, layers=tuple(layers), positions=positions)

    def extended(self, token: int) -> RowSource:
        """Return the source of the text with one more token."""
        ids = mx.concatenate([self.ids, mx.array([[token]], dtype=self.ids.dtype)], axis=1)
        return replace(self, ids=ids, positions=range(ids.shape[1]))


def part_size(sources: Sequence[RowSource]) -> int:
    """Return the tokens of a part: all if the model has no cache, else as many as fit into ROWS_BYTES, at least 16.

    Args:
        sources: the lenses that read one text, as in `parts_of`.
    """
    model, ids = sources[0].model, sources[0].ids
    if not model.source.takes_cache:
        return int(ids.shape[1])
    rows = sum(len(source.layers) for source in sources)
    return max(16, ROWS_BYTES // (4 * (rows + model.num_layers + 2) * model.unembed.hidden_dim))


def parts_of(sources: Sequence[RowSource], size: int | None = None) -> Iterator[tuple[list[mx.array], mx.array]]:
    """Yield one part of the positions after another, from one forward pass: the rows of each lens [R, c, D], and the model's own [c, D]. Lazy.

    Args:
        sources: the lenses that read one text: sources with one model, one text and the same positions.
        size: tokens of a part. None = `part_size`.
    """
    size = part_size(sources) if size is None else size
    first = sources[0]
    model, positions, with_embedding = first.model.source, first.positions, _read_embedding(sources)
    ids = first.ids[:, : positions.stop]
    if ids.shape[1] <= size or not model.takes_cache:
        captured = iter([model.capture(ids, with_embedding=with_embedding)])
    else:
        captured = model.chunks(ids, size, with_embedding=with_embedding)
    begin = 0
    for states in captured:
        length = states.hidden[0].shape[1]
        start, stop = max(positions.start - begin, 0), min(positions.stop - begin, length)
        if start < stop:
            yield rows_of(sources, states, slice(start, stop))
        begin += length


def next_rows(sources: Sequence[RowSource], ids: mx.array, cache: Any) -> tuple[list[mx.array], mx.array]:
    """Return the rows of tokens [1, c] that follow those of a cache, which gets them too. Otherwise as a part of `parts_of`."""
    states = sources[0].model.source.capture_next(ids, cache, with_embedding=_read_embedding(sources))
    return rows_of(sources, states, slice(0, ids.shape[1]))


def rows_of(sources: Sequence[RowSource], states: HiddenStates, where: slice) -> tuple[list[mx.array], mx.array]:
    """Return the rows of some positions of captured hidden states: those of each lens [R, c, D], and the model's own [c, D]. Lazy."""
    own = sources[0].model.unembed.norm(states.hidden[-1][0, where]).astype(mx.float32)
    return [source.rows(states, where) for source in sources], own


def _read_embedding(sources: Sequence[RowSource]) -> bool:
    return any(EMBEDDING in source.layers for source in sources)


def without(head: Head, ids: mx.array) -> Head:
    """Return a head that never predicts these tokens.

    Raises:
        InvalidValueError: if no token is left.
    """
    ruled_out = np.zeros(head.vocab_size, bool)
    ruled_out[np.array(ids).reshape(-1)] = True
    if ruled_out[: head.tokens].all():
        raise InvalidValueError("mask_input rules out every token of the vocabulary: the text holds them all. Read it without mask_input.")
    mask = mx.array(np.where(ruled_out, -np.inf, 0).astype(np.float32))
    return replace(head, offset=mask if head.offset is None else head.offset + mask)
