"""Text, ids and arrays of ids: the inputs a user may have, and the one form that models take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidTypeError, InvalidValueError

TokenInput: TypeAlias = "str | Sequence[int] | mx.array"

NO_TOKENIZER = "No tokenizer available. Pass a tokenizer to InterpretableModel or load a model that includes one."


class TokenizerMixin(ABC):
    """Encoding and decoding with `self.tokenizer`, and checked token ids."""

    tokenizer: Any

    @property
    @abstractmethod
    def embedding_rows(self) -> int:
        """How many token ids the model knows."""

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InvalidValueError(NO_TOKENIZER)
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """The tokenizer's ids of a text, with the special tokens that it adds."""
        return list(self._require_tokenizer().encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | mx.array) -> str:
        """The text of ids."""
        ids = to_list(tokens.reshape(-1)) if isinstance(tokens, mx.array) else list(tokens)
        return str(self._require_tokenizer().decode(ids))

    def token_to_str(self, token_id: int) -> str:
        """The text of one id."""
        return self.decode([token_id])

    def to_str_tokens(self, text: TokenInput, prepend_bos: bool = False) -> list[str]:
        """The text of every token.

        Args:
            text: a string, ids, or an array of ids (of a batch, row 0).
            prepend_bos: put the tokenizer's beginning-of-sequence token first, if it has one.
        """
        ids = to_list(self.ids(text)[0])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if prepend_bos and bos is not None:
            ids = [bos, *ids]
        return [self.token_to_str(i) for i in ids]

    def token_strings(self, ids: mx.array) -> dict[int, str]:
        """The text of each different id in an array; without a tokenizer, the id's digits."""
        distinct = sorted({int(i) for i in to_list(ids.reshape(-1))})
        return {i: self.token_to_str(i) if self.tokenizer is not None else str(i) for i in distinct}

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's size, if it tells one."""
        tokenizer = self._require_tokenizer()
        for name in ("vocab_size", "n_words"):
            size = getattr(tokenizer, name, None)
            if size is not None:
                return int(size)
        return len(tokenizer) if hasattr(tokenizer, "__len__") else None

    def ids(self, text: TokenInput | Sequence[str] | Sequence[Sequence[int]]) -> mx.array:
        """Checked ids [B, T] of a text, texts (padded on the right with 0), a list of ids, or an array of ids [T] or [B, T].

        Raises:
            ValueError: for empty input, ids outside the vocabulary, or text without a tokenizer.
            TypeError: for anything else.
        """
        return self.ids_and_mask(text)[0]

    def ids_and_mask(self, text: TokenInput | Sequence[str] | Sequence[Sequence[int]]) -> tuple[mx.array, mx.array | None]:
        """The same, and a mask [B, T] that is false where a text was padded; None where none was."""
        mask = None
        if isinstance(text, str):
            array = np.asarray(self.encode(text))
        elif isinstance(text, mx.array):
            array = np.array(text) if text.dtype != mx.bfloat16 else np.array(text.astype(mx.float32))
        elif isinstance(text, Sequence) and len(text) > 0 and all(isinstance(t, str) for t in text):
            rows = [self.encode(str(t)) for t in text]
            width = max(map(len, rows))
            array = np.asarray([row + [0] * (width - len(row)) for row in rows])
            if any(len(row) < width for row in rows):
                mask = mx.array([[i < len(row) for i in range(width)] for row in rows])
        else:
            try:
                array = np.asarray(text)
            except (ValueError, TypeError):
                array = np.asarray(None)
            if array.ndim == 0 or array.dtype.kind in "US":
                raise InvalidTypeError(f"Expected text, a list of token ids or an array of them, got {type(text).__name__}.")
        if array.size == 0:
            raise InvalidValueError("There are no tokens in the input. Pass text that is not empty, or at least one token id.")
        if array.ndim not in (1, 2):
            raise InvalidValueError(f"Token ids must be [T] or [B, T], got {array.shape}.")
        return self.check_ids(array.reshape(-1, array.shape[-1])), mask

    def check_ids(self, ids: np.ndarray) -> mx.array:
        """The ids as MLX's int32, if every one is a row of the embedding.

        Raises:
            ValueError: naming the first id that is not; MLX itself would read other memory.
            TypeError: if they are not integers.
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
