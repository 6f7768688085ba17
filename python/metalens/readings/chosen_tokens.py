"""Chosen tokens: their probability and rank over layers and positions, and where they are first on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from metalens.models.language_model import LanguageModel
from metalens.models.token_text import WORD_START, is_token_text
from metalens.readings.numbering import Layer, upstream_layer
from metalens.readings.rows import is_whole
from metalens.readings.trajectory_data import TrajectoryData
from metalens.utils.errors import InvalidTypeError, InvalidValueError

LONGEST_TEXT = 200  # characters of a text that names a token
MOST_PARTS = 8  # parts of a text that an error names


@dataclass(frozen=True, eq=False)
class ChosenToken:
    """One token over R layers and T positions of a trajectory.

    Attributes:
        trajectory: the trajectory.
        id: token id.
        probabilities: [R, T] its probability as the next token.
        ranks: [R, T] int32 its rank, 1 = most likely.
        model_ranks: [T] int32 its rank in the model's own prediction.
    """

    trajectory: TrajectoryData
    id: int
    probabilities: np.ndarray
    ranks: np.ndarray
    model_ranks: np.ndarray

    @property
    def text(self) -> str:
        """Return the text of the token."""
        return self.trajectory.texts[self.id]

    def first_on_top(self, position: int = -1) -> Layer | None:
        """Return the first layer, from the embedding up, whose most likely next token is this one. None = there is none.

        Args:
            position: position of the whole text, negative from the last column.

        Raises:
            InvalidValueError: if this position was not read.
        """
        column = self.trajectory.column(position)
        on_top = [layer for layer, rank in zip(self.trajectory.layers, self.ranks[:, column], strict=True) if rank == 1]
        return min(on_top, key=upstream_layer, default=None)


def token_ids_of(model: LanguageModel, tokens: Sequence[str | int]) -> tuple[int, ...]:
    """Return the ids of tokens that are given by text or id, each once, in their order.

    Args:
        model: the model. Its tokenizer must have a token of exactly this text, with its leading spaces.
        tokens: texts or ids.

    Raises:
        InvalidValueError: if a text is no single token, or no text of a token, or a token is none that the model can predict.
        InvalidTypeError: if an entry is neither, or `tokens` is a string.
    """
    if isinstance(tokens, str):
        raise InvalidTypeError(f"tokens must be a list of texts and ids, got the string {tokens!r:.80}. Write [{tokens!r:.80}].")

    @cache
    def vocabulary() -> Mapping[str, int]:  # some tokenizers build it anew each time
        found: Mapping[str, int] = getattr(model.plain_encoder.tokenizer, "get_vocab", dict)()
        return found

    def token_id(token: str | int) -> int:
        if isinstance(token, str):
            return _id_of_text(model, token, vocabulary)
        if not is_whole(token):
            raise InvalidTypeError(f"A token is a text or an id, got {token!r:.80}.")
        if not 0 <= token < model.unembed.head.tokens:
            raise InvalidValueError(f"There is no token {token!r:.40}: the model predicts the tokens 0 to {model.unembed.head.tokens - 1}.")
        return int(token)

    return tuple(dict.fromkeys(token_id(token) for token in tokens))


def _id_of_text(model: LanguageModel, text: str, vocabulary: Callable[[], Mapping[str, int]]) -> int:
    if len(text) > LONGEST_TEXT:
        raise InvalidValueError(f"{text!r:.40}... has {len(text):,} characters: too many for a token. Give one token, or its id.")
    ids = model.encode(text, bos=False)
    if len(ids) == 1 and _is_named(model, ids[0], text):
        return ids[0]
    # A tokenizer may put a space of its own before a text, or take one away; its vocabulary tells.
    for piece in (text.replace(" ", WORD_START), text):
        found = vocabulary().get(piece)
        if found is not None and _is_named(model, found, text):
            return found
    parts = [model.token_to_str(i) for i in ids[:MOST_PARTS]]
    rest = f" and {len(ids) - MOST_PARTS} more" if len(ids) > MOST_PARTS else ""
    raise InvalidValueError(
        f"{text!r:.80} is no single token; the tokenizer cuts it into {parts}{rest}. Give one token, or its id. Many tokens begin with a space."
    )


def _is_named(model: LanguageModel, token_id: int, text: str) -> bool:
    """Return whether the model can predict a token, and the text is this token's. A tokenizer reads an unknown text as a token of another text."""
    return 0 <= token_id < model.unembed.head.tokens and is_token_text(model.plain_encoder.tokenizer, token_id, text)
