"""Convert text, token ids and arrays of them, as users have them, into the one form that models take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast, overload

import mlx.core as mx
import numpy as np

from metalens.models.plain_encoder import PlainEncoder, require_unicode
from metalens.models.token_text import token_text
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidTypeError, InvalidValueError
from metalens.utils.warn import warn_caller

# One text: a string, token ids, or an array of them.
TokenInput: TypeAlias = str | Sequence[int] | mx.array
# Several texts: strings, or lists of token ids of one length.
TokenBatch: TypeAlias = Sequence[str] | Sequence[Sequence[int]]

NO_TOKENIZER = "No tokenizer available. Pass a tokenizer to InterpretableModel or load a model that includes one."


def as_token_ids(value: Any) -> np.ndarray:
    """Return token ids [T] or [B, T] as a NumPy array. An array of NumPy is returned as it is.

    The ids are not compared with a vocabulary, and may be none: see `Tokenization.check_ids`.

    Args:
        value: a list of integers, a list of lists of one length, or an array of NumPy or MLX.

    Raises:
        InvalidTypeError: if it is anything else, for example a string, or lists of different lengths.
        InvalidValueError: if it has more than two dimensions.
    """
    if isinstance(value, mx.array) and value.dtype == mx.bfloat16:
        value = value.astype(mx.float32)  # NumPy has no bfloat16; `check_ids` refuses both, and names the type
    kind = type(value).__name__
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InvalidTypeError(_expected(kind)) from error
    if array.ndim == 0 or array.dtype.kind in "US":
        raise InvalidTypeError(_expected(kind))
    if array.ndim > 2:
        raise InvalidValueError(f"Token ids must be [T] or [B, T], got {array.shape}.")
    return array


def _expected(kind: str) -> str:
    return f"Expected text, a list of token ids or an array of them, got {kind}."


class Tokenization(ABC):
    """The part of a language model that encodes and decodes with its tokenizer, and checks token ids."""

    tokenizer: Any
    _encoder: tuple[Any, PlainEncoder] | None = None

    @property
    @abstractmethod
    def embedding_rows(self) -> int:
        """Return the number of token ids that the model knows."""

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InvalidValueError(NO_TOKENIZER)
        return self.tokenizer

    @property
    def plain_encoder(self) -> PlainEncoder:
        """Return the encoder of the tokenizer (InvalidValueError without one)."""
        tokenizer = self._require_tokenizer()
        if self._encoder is None or self._encoder[0] is not tokenizer:
            self._encoder = (tokenizer, PlainEncoder(tokenizer))
        return self._encoder[1]

    @property
    def prefix(self) -> tuple[int, ...]:
        """Return the ids that belong before every sequence: those that the tokenizer puts before a text, often a BOS token or none."""
        return () if self.tokenizer is None else self.plain_encoder.prefix

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: the text. Special tokens that it spells ("<bos>") become these tokens.
            bos: add the special tokens that the tokenizer adds. If the text spells them at its start itself, as chat templates do, they are not
                added again, with a warning. False = add none.
        """
        encoder = self.plain_encoder
        require_unicode(text)
        if not bos:
            return list(encoder.encode([text])[0])
        ids, prefix = list(self.tokenizer.encode(text)), list(encoder.prefix)
        if prefix and ids[: 2 * len(prefix)] == 2 * prefix:
            warn_caller(f"The text begins with {self.decode(prefix)!r}, which the tokenizer adds too; it is read once.")
            return ids[len(prefix) :]
        return ids

    def encode_chat(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation in the tokenizer's chat template, up to where the model's answer begins.

        Args:
            messages: what the user says, or messages like {"role": "user", "content": "..."}.

        Raises:
            InvalidValueError: if the tokenizer has no chat template, or the template refuses the messages.
        """
        encoder = self.plain_encoder
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(message) for message in messages]
        text = encoder.chat_text(chat, answer_begins=True)
        return list(encoder.encode([require_unicode(text)])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | mx.array) -> str:
        """Return the text of token ids."""
        ids = to_list(tokens.reshape(-1)) if isinstance(tokens, mx.array) else list(tokens)
        return str(self._require_tokenizer().decode(ids))

    def token_to_str(self, token_id: int) -> str:
        """Return the text of one token: see `metalens.models.token_text.token_text`."""
        return token_text(self.plain_encoder.tokenizer, token_id)

    @overload
    def to_str_tokens(self, text: TokenInput, prepend_bos: bool = False) -> list[str]: ...
    @overload
    def to_str_tokens(self, text: list[str] | tuple[str, ...], prepend_bos: bool = False) -> list[list[str]]: ...
    def to_str_tokens(self, text: TokenInput | list[str] | tuple[str, ...], prepend_bos: bool = False) -> list[str] | list[list[str]]:
        """Return the text of every token.

        Args:
            text: a string, token ids, or an array of them; or a list of strings. Of an array [B, T], row 0 is used.
            prepend_bos: put the tokenizer's beginning-of-sequence token first, if it has one and the ids do not begin with it.

        Returns:
            the texts; for a list of strings a list of such lists.
        """
        if isinstance(text, (list, tuple)) and text and all(isinstance(each, str) for each in text):
            return [self.to_str_tokens(str(each), prepend_bos) for each in text]
        ids = to_list(self.ids(cast("TokenInput", text))[0])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if prepend_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return [self.token_to_str(i) for i in ids]

    def token_strings(self, ids: mx.array) -> dict[int, str]:
        """Return {id: text} for the different ids in an array. Without a tokenizer, the text is the id's digits."""
        distinct = sorted({int(i) for i in to_list(ids.reshape(-1))})
        return {i: self.token_to_str(i) if self.tokenizer is not None else str(i) for i in distinct}

    @property
    def vocab_size(self) -> int | None:
        """Return the tokenizer's number of tokens, or None if it does not tell."""
        tokenizer = self._require_tokenizer()
        for name in ("vocab_size", "n_words"):
            size = getattr(tokenizer, name, None)
            if size is not None:
                return int(size)
        return len(tokenizer) if hasattr(tokenizer, "__len__") else None

    def ids(self, text: TokenInput | TokenBatch) -> mx.array:
        """Return checked token ids [B, T].

        Args:
            text: a string; several strings, which are padded on the right with token 0; a list of token ids, or several of one length; an array
                of token ids [T] or [B, T].

        Raises:
            InvalidValueError: if the input is empty, an id is outside the vocabulary, or there is text and no tokenizer.
            InvalidTypeError: if it is anything else.
        """
        return self.ids_and_mask(text)[0]

    def ids_and_mask(self, text: TokenInput | TokenBatch) -> tuple[mx.array, mx.array | None]:
        """Return `ids` and a mask [B, T], false for padding. The mask is None if no text was padded."""
        mask = None
        if isinstance(text, str):
            array = np.asarray(self.encode(text))
        elif isinstance(text, Sequence) and len(text) > 0 and all(isinstance(t, str) for t in text):
            array, mask = _padded([self.encode(str(t)) for t in text])
        else:
            array = as_token_ids(text)
        if array.size == 0:
            raise InvalidValueError("There are no tokens in the input. Pass text that is not empty, or at least one token id.")
        return self.check_ids(array.reshape(-1, array.shape[-1])), mask

    def check_ids(self, ids: np.ndarray) -> mx.array:
        """Return token ids as MLX's int32, if each is a row of the embedding. For other ids MLX would read memory outside of it.

        Raises:
            InvalidValueError: if an id is outside the vocabulary. The error names such an id.
            InvalidTypeError: if they are not integers.
        """
        # Python integers beyond 64 bits come as objects.
        if ids.size and ids.dtype.kind not in "iu" and not all(isinstance(i, int) for i in ids.flat):
            raise InvalidTypeError(f"Token ids must be integers, got {ids.dtype}.")
        outside = [int(i) for i in (ids.min(), ids.max()) if not 0 <= i < self.embedding_rows] if ids.size else []
        if outside:
            raise InvalidValueError(
                f"Token id {outside[0]} is outside the model's vocabulary (0 to {self.embedding_rows - 1}). Is this the model's own tokenizer?"
            )
        return mx.array(ids.astype(np.int32))


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, mx.array | None]:
    """Return ids [B, T], padded on the right with 0, and a mask that is false for padding; the mask is None if all rows have one length."""
    width = max(map(len, rows))
    array = np.asarray([row + [0] * (width - len(row)) for row in rows])
    if all(len(row) == width for row in rows):
        return array, None
    return array, mx.array([[i < len(row) for i in range(width)] for row in rows])
