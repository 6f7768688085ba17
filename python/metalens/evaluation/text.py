"""The text of an evaluation, one sequence at a time, and how many bytes it has. Nothing here grows with the text's length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput, as_token_ids
from metalens.utils.errors import InvalidTypeError, InvalidValueError


class CorpusLike(Protocol):
    """Token ids and where their documents begin: `metalens.training.data.Corpus`, or anything of its kind.

    Attributes:
        ids: [tokens].
        documents: [documents + 1] the first token of each document, and the number of tokens.
        join: "eos" = one stream, to be cut across documents; "packed" = no sequence crosses the end of a document.
        prefix: ids that belong before every sequence.
        joined_bytes: UTF-8 bytes of the text whose tokens `ids` are, or None.
    """

    @property
    def ids(self) -> np.ndarray: ...  # noqa: D102
    @property
    def documents(self) -> np.ndarray: ...  # noqa: D102
    @property
    def join(self) -> str: ...  # noqa: D102
    @property
    def prefix(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def joined_bytes(self) -> int | None: ...  # noqa: D102


# One text, a corpus, or any iterable of documents: texts, or arrays of ids [T].
EvaluationText: TypeAlias = "TokenInput | np.ndarray | CorpusLike | Iterable[str | Sequence[int] | np.ndarray | mx.array]"

# Tokens of context with which a piece of text is decoded. A character has at most 4 bytes, and so spans at most 4 tokens.
CONTEXT = 8


def _corpus(text: Any) -> CorpusLike | None:
    return text if all(hasattr(text, name) for name in ("ids", "documents", "join", "prefix", "joined_bytes")) else None


def documents(model: LanguageModel, text: EvaluationText) -> Iterator[np.ndarray]:
    """The documents of a text, as arrays of ids [T], one after another as they are asked for; arrays of NumPy are not copied.

    A string, a list of ids or an array [T] is one document. Each row of an array [B, T] is one, and so is each item of any other iterable. A corpus
    is one unless it is "packed".

    Raises:
        ValueError: for arrays of more dimensions, or a string without a tokenizer.
        TypeError: for what is no text.
    """
    corpus = _corpus(text)
    if corpus is not None:
        bounds = [0, len(corpus.ids)] if corpus.join == "eos" else corpus.documents
        yield from (corpus.ids[int(start) : int(end)] for start, end in pairwise(bounds))
    elif isinstance(text, (str, mx.array, np.ndarray)):
        yield from _rows(model, text)
    elif isinstance(text, Iterable):
        items: Iterator[Any] = iter(text)
        for item in items:
            if isinstance(item, (int, np.integer)):
                yield np.asarray(list(chain([item], items)))
                return
            yield from _rows(model, item)
    else:
        raise InvalidTypeError(f"Expected text, token ids, or an iterable of them, got {type(text).__name__}.")


def _rows(model: LanguageModel, text: Any) -> Iterator[np.ndarray]:
    array = as_token_ids(model.encode(text) if isinstance(text, str) else text)
    yield from (array[None] if array.ndim == 1 else array)


class Sequences:
    """A text as sequences of checked ids [T], T <= length unless said; iterate once.

    A sequence begins with the corpus's prefix, if there is one, and does not span two documents. A tail of one token, which could predict nothing,
    joins the sequence before it, which then has length + 1; a document of one token stands alone. Of an endless text no document is fetched beyond
    max_tokens. Iterating raises what `documents` does, and ValueError for ids outside the vocabulary.

    Args:
        model: knows the ids.
        text: what to read.
        length: of the sequences, the prefix included.
        max_tokens: read only so many tokens from the start; prefixes do not count.

    Attributes:
        prefix: ids before every sequence.
        tokens: of the text, read so far; prefixes do not count.

    Raises:
        ValueError: if no token fits into a sequence.
    """

    def __init__(self, model: LanguageModel, text: EvaluationText, length: int, max_tokens: int | None = None) -> None:
        self.model = model
        self.text: EvaluationText = np.asarray(model.encode(text)) if isinstance(text, str) else text
        self.max_tokens = max_tokens
        self.tokens = 0
        corpus = _corpus(text)
        self.prefix = [] if corpus is None else [int(i) for i in corpus.prefix]
        self.room = length - len(self.prefix)
        if self.room < 1:
            raise InvalidValueError(f"Sequences of {length} tokens have no room for text: each begins with {len(self.prefix)} special tokens.")
        known = corpus is not None and corpus.joined_bytes is not None
        self._bytes = None if known else ByteCount(model)

    def __iter__(self) -> Iterator[mx.array]:
        """The sequences."""
        found = documents(self.model, self.text)
        while self.tokens != self.max_tokens and (document := next(found, None)) is not None:
            size = len(document) if self.max_tokens is None else min(len(document), self.max_tokens - self.tokens)
            start = 0
            while start < size:
                end = start + self.room
                if size - end + len(self.prefix) <= 1:
                    end = size
                piece = np.asarray(document[start:end])
                if self._bytes is not None:
                    self._bytes.add(piece.tolist())
                self.tokens += end - start
                yield self.model.check_ids(np.concatenate([np.asarray(self.prefix, piece.dtype), piece]) if self.prefix else piece)
                start = end

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes for each token of the text read (prefixes do not count): those of the whole corpus where it knows them, else those read.

        Raises:
            ValueError: if there are none.
        """
        corpus = _corpus(self.text)
        if self._bytes is None and corpus is not None and corpus.joined_bytes is not None:
            found = corpus.joined_bytes / len(corpus.ids)
        else:
            found = 0.0 if self._bytes is None else self._bytes.total / self.tokens
        if not found > 0:
            raise InvalidValueError("The tokens read decode to no text at all, which has no bits per byte. Pass bytes_per_token.")
        return found

    @property
    def size(self) -> int:
        """Tokens that will be read, for a progress bar; 0 = not known before the text has been read."""
        text = self.text if (corpus := _corpus(self.text)) is None else corpus.ids
        size = len(text) if isinstance(text, (list, tuple)) and text and isinstance(text[0], int) else getattr(text, "size", None)
        known = [n for n in (size, self.max_tokens) if isinstance(n, int)]
        return min(known) if known else 0


class ByteCount:
    """UTF-8 bytes of a text that is decoded piece by piece; without a tokenizer a token counts as one byte.

    Each piece is decoded together with the last tokens before it, and those tokens' own bytes are taken off again: a character that two pieces share
    is counted once, and the space that some tokenizers drop at the start of a text is counted where it is not the start.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.total = 0
        self._context: list[int] = []

    def add(self, ids: list[int]) -> None:
        """Count the next tokens of the text."""
        if self.model.tokenizer is None:
            self.total += len(ids)
            return
        self.total += self._bytes(self._context + ids) - self._bytes(self._context)
        self._context = (self._context + ids)[-CONTEXT:]

    def _bytes(self, ids: list[int]) -> int:
        return len(self.model.decode(ids).encode()) if ids else 0
