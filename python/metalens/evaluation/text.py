"""The text of an evaluation, one sequence at a time, and its number of bytes. Memory does not grow with the length of the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import as_token_ids
from metalens.utils.errors import InvalidTypeError, InvalidValueError


class CorpusLike(Protocol):
    """Token ids and the bounds of their documents: `metalens.training.data.Corpus`, or an object with the same attributes.

    Attributes:
        ids: [tokens] token ids.
        documents: [documents + 1] index of the first token of each document, and the number of tokens.
        join: "eos" = cut sequences across documents; "packed" = no sequence crosses the end of a document.
        prefix: ids that go before every sequence.
        joined_bytes: UTF-8 bytes of the tokenized text, or None.

    An object that also has `counted`, whether the prediction at each token counts, bool [tokens], is read at these tokens alone.
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


# One text (a string, ids, an array of ids), a corpus, or any iterable of documents: texts, or arrays of ids [T].
EvaluationText: TypeAlias = str | mx.array | np.ndarray | CorpusLike | Iterable[int | str | Sequence[int] | np.ndarray | mx.array]

# Tokens before a piece of text that are decoded with it. A character has at most 4 bytes, and so spans at most 4 tokens.
CONTEXT = 8


def _corpus(text: Any) -> CorpusLike | None:
    """Return the text if it is a corpus, else None."""
    return text if all(hasattr(text, name) for name in ("ids", "documents", "join", "prefix", "joined_bytes")) else None


def documents(model: LanguageModel, text: EvaluationText) -> Iterator[np.ndarray]:
    """Yield the documents of a text as arrays of ids [T], lazily. NumPy arrays are not copied. Text is encoded without special tokens.

    A string, a list of ids or an array [T] is one document. Each row of an array [B, T] is a document, and so is each
    item of any other iterable. A corpus is one document unless it is "packed".

    Raises:
        InvalidValueError: for an array of more dimensions, or a string without a tokenizer.
        InvalidTypeError: if the input is no text.
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


def _masked_documents(corpus: CorpusLike, counted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the documents of a corpus, each with its part of the mask."""
    bounds = [0, len(corpus.ids)] if corpus.join == "eos" else corpus.documents
    yield from ((corpus.ids[int(start) : int(end)], np.asarray(counted[int(start) : int(end)])) for start, end in pairwise(bounds))


def _rows(model: LanguageModel, text: Any) -> Iterator[np.ndarray]:
    array = as_token_ids(model.encode(text, bos=False) if isinstance(text, str) else text)
    yield from (array[None] if array.ndim == 1 else array)


def _bytes_per_token(given: EvaluationText, text: EvaluationText, corpus: CorpusLike | None) -> float | None:
    """Return the mean over the whole text, if it is known before the text is read. Of some of its tokens it is not known."""
    if getattr(corpus, "counted", None) is not None:
        return None
    if corpus is not None:
        return None if corpus.joined_bytes is None else corpus.joined_bytes / len(corpus.ids)
    return len(given.encode()) / text.size if isinstance(given, str) and isinstance(text, np.ndarray) and text.size else None


class Sequences:
    """The sequences of a text: checked ids [T] with T <= length. Iterate once.

    A sequence begins with the prefix, if there is one, and does not span two documents. A document that begins with the
    prefix itself loses it there. A tail of one token would predict nothing, so it joins the sequence before it, which
    then has length + 1 tokens. Where that is beyond the model's context, the sequence before it gives it a token
    instead. A document of one token is a sequence of its own. No document beyond max_tokens is fetched, so a text may
    be endless. Iteration raises the errors of `documents`, and InvalidValueError for ids outside the vocabulary.

    Attributes:
        prefix: ids before every sequence.
        tokens: number of tokens of the text that were read so far, without prefixes.
        counted_tokens: number of those whose prediction counts.
    """

    def __init__(self, model: LanguageModel, text: EvaluationText, length: int, max_tokens: int | None = None, bos: bool = True) -> None:
        """Open a text.

        Args:
            model: a model that encodes text and checks ids.
            text: the text.
            length: tokens per sequence, with the prefix.
            max_tokens: tokens to read from the start, without prefixes; None = all.
            bos: put the corpus's prefix, for other texts that of the model's tokenizer, before every sequence.

        Raises:
            InvalidValueError: if no token fits into a sequence.
        """
        self.model = model
        self.text: EvaluationText = np.asarray(model.encode(text, bos=False)) if isinstance(text, str) else text
        self.max_tokens = max_tokens
        self.tokens = self.counted_tokens = 0
        corpus = _corpus(text)
        self._counted = getattr(corpus, "counted", None)
        self.prefix = [int(i) for i in (model.prefix if corpus is None else corpus.prefix)] if bos else []
        self.room = length - len(self.prefix)
        if self.room < 1:
            raise InvalidValueError(f"Sequences of {length} tokens have no room for text: each begins with {len(self.prefix)} special tokens.")
        self._may_grow = length != model.context
        self._ratio = _bytes_per_token(text, self.text, corpus)
        self._bytes = ByteCount(model) if self._ratio is None else None

    def __iter__(self) -> Iterator[mx.array]:
        """Yield the sequences, [T] each."""
        yield from (ids for ids, _ in self.masked())

    def masked(self) -> Iterator[tuple[mx.array, np.ndarray | None]]:
        """Yield the sequences, [T] each, with the tokens at which the prediction counts, bool [T]; None = at every token.

        Sequences without such a token are read over.
        """
        found: Iterator[tuple[np.ndarray, np.ndarray | None]] = zip(documents(self.model, self.text), repeat(None))
        corpus = _corpus(self.text)
        if corpus is not None and self._counted is not None:
            found = iter(_masked_documents(corpus, self._counted))
        while self.tokens != self.max_tokens and (following := next(found, None)) is not None:
            document, counted = following
            if self.prefix and document[: len(self.prefix)].tolist() == self.prefix:
                document, counted = document[len(self.prefix) :], None if counted is None else counted[len(self.prefix) :]
            size = len(document) if self.max_tokens is None else min(len(document), self.max_tokens - self.tokens)
            start = 0
            while start < size:
                end = start + self.room
                if size - end + len(self.prefix) <= 1:
                    end = end - 1 if size > end and not self._may_grow else size
                piece, mask = np.asarray(document[start:end]), None if counted is None else counted[start:end]
                if mask is not None:
                    self._count(np.asarray(document[start + 1 : end + 1])[mask[: len(document) - start - 1]])
                else:
                    self._count(piece)
                self.tokens += end - start
                if mask is None or mask.any():
                    ids = self.model.check_ids(np.concatenate([np.asarray(self.prefix, piece.dtype), piece]) if self.prefix else piece)
                    yield ids, None if mask is None else np.concatenate([np.zeros(len(self.prefix), bool), mask])
                start = end

    def _count(self, ids: np.ndarray) -> None:
        """Count tokens whose prediction counts, and their bytes."""
        self.counted_tokens += ids.size
        if self._bytes is not None:
            self._bytes.add(ids.tolist())

    @property
    def bytes_per_token(self) -> float:
        """Return the UTF-8 bytes per token, without prefixes, of the tokens whose prediction counts.

        It is a mean over a whole corpus that knows its bytes, or a whole string, as in upstream; else over the tokens read
        so far.

        Raises:
            InvalidValueError: if the text has no bytes.
        """
        found = self._bytes.total / max(self.counted_tokens, 1) if self._bytes is not None else self._ratio or 0.0
        if not found > 0:
            raise InvalidValueError("The tokens read decode to no text at all, which has no bits per byte. Pass bytes_per_token.")
        return found

    @property
    def size(self) -> int:
        """Return the number of tokens to read, for a progress bar; 0 = unknown until the text has been read."""
        text = self.text if (corpus := _corpus(self.text)) is None else corpus.ids
        size = len(text) if isinstance(text, (list, tuple)) and text and isinstance(text[0], int) else getattr(text, "size", None)
        known = [n for n in (size, self.max_tokens) if isinstance(n, int)]
        return min(known) if known else 0


class ByteCount:
    """Counts the UTF-8 bytes of a text piece by piece. Without a tokenizer a token counts as one byte.

    Each piece is decoded together with the last tokens before it, and the bytes of these tokens are subtracted. So a
    character that spans two pieces is counted once. Some tokenizers drop a space at the start of a text; here it is
    dropped at the start of the first piece only.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.total = 0
        self._context: list[int] = []

    def add(self, ids: list[int]) -> None:
        """Add the bytes of the next tokens of the text."""
        if self.model.tokenizer is None:
            self.total += len(ids)
            return
        self.total += self._bytes(self._context + ids) - self._bytes(self._context)
        self._context = (self._context + ids)[-CONTEXT:]

    def _bytes(self, ids: list[int]) -> int:
        return len(self.model.decode(ids).encode()) if ids else 0
