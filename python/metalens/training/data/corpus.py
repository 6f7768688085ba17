"""A text as token ids on disk: tokenized by the first run, opened by later ones.

Conventions. Documents are tokenized without special tokens.
- join="eos": the documents follow each other in one row of ids, each with the tokenizer's EOS token before it: EOS d1 EOS d2 ... Sequences are cut
  from it across documents (tuned-lens's convention; the ids are those of its joined text).
- join="packed": there are no separators, and no sequence crosses the end of a document.
A beginning-of-sequence token is never among these ids. The ids that the tokenizer puts before a text are `Corpus.prefix`, and the sampler puts them
before every sequence: models with such a token have seen this in training, and tuned-lens trains on it. A document that spells them itself at its
start loses them there: they are never in a sequence twice. Ids that a tokenizer puts after a text are left out.

With loss_on="answers" a mask says at which tokens the prediction counts: at those before a token of an answer. A model predicts the first token of an
answer at the last token of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from metalens.models.tokenization import as_token_ids
from metalens.training.data.cache import StoredTokens, TokenCache
from metalens.training.data.conversations import CHAT_FIELDS
from metalens.training.data.in_memory import ChatList
from metalens.training.data.readers import BLOCK, FileSource, ParquetFile, Piece, Source, TextFile
from metalens.training.data.sources import find_sources
from metalens.training.data.tokenizing import TextTokenizer, digest, encoded
from metalens.utils.errors import InvalidTypeError, InvalidValueError
from metalens.utils.warn import warn_caller

Join = Literal["eos", "packed"]
LossOn = Literal["all", "answers"]
FORMAT = 1  # raise it when a change of this package changes the tokens of a text and tokenizer


class Corpus:
    """Token ids and their origin. Made by `open_corpus` or `from_ids`.

    Attributes:
        ids: token ids [tokens], of an unsigned type or int32; a memory map if they come from the cache.
        documents: first token of each document (with join="eos" its EOS), and the number of tokens, [documents + 1].
        prefix: ids that belong before every sequence and are not in `ids`.
        join: "eos" or "packed", as above.
        bytes: UTF-8 bytes of the documents, for bits per byte. None = ids without text.
        joined_bytes: the same with the EOS tokens as text between the documents; tuned-lens divides by this.
        fingerprint: hash that changes with the text, the tokenizer, the joining and the tokens that count.
        counted: whether the prediction at each token counts in the loss, bool [tokens]. None = at every token, and at the prefix.
    """

    def __init__(
        self,
        ids: np.ndarray,
        documents: np.ndarray,
        join: Join,
        *,
        prefix: tuple[int, ...] = (),
        byte_counts: tuple[int, int] | None = None,
        counted: np.ndarray | None = None,
        about: dict[str, Any],
    ) -> None:
        self.ids = ids
        self.counted = counted
        self.documents = documents
        self.join: Join = join
        self.prefix = prefix
        self.bytes: int | None
        self.joined_bytes: int | None
        self.bytes, self.joined_bytes = byte_counts or (None, None)
        self._about = about
        self.fingerprint = str(about["fingerprint"])

    @property
    def tokens(self) -> int:
        """Return the number of ids, without `prefix`."""
        return int(self.ids.size)

    @cached_property
    def counted_tokens(self) -> int:
        """Return the number of tokens at which the prediction counts, without `prefix`."""
        return self.tokens if self.counted is None else int(np.count_nonzero(self.counted))

    @classmethod
    def from_ids(cls, ids: Any, *, prefix: Sequence[int] = (), answers: Any = None) -> Corpus:
        """Make a corpus of one document from token ids.

        Args:
            ids: token ids [tokens]: a list, or an array of NumPy or MLX.
            prefix: ids that belong before every sequence.
            answers: true for the tokens whose prediction counts in the loss, [tokens], as in the `assistant_masks` of transformers; labels other than
                -100 are such tokens. None = every token.

        Raises:
            InvalidTypeError: if they are not integers.
            InvalidValueError: if there are none, if they are not one-dimensional, if one is negative or too large, or if `answers` has another shape
                or no true value that a token is before.
        """
        array = as_token_ids(ids)
        if array.dtype.kind not in "iu":
            raise InvalidTypeError(
                f"Token ids must be integers, got {array.dtype}." if array.size else "There are no token ids. Give text that is not empty."
            )
        if array.ndim != 1 or not array.size:
            raise InvalidValueError(f"Token ids must be [tokens] and not empty, got {array.shape}.")
        if not 0 <= array.min() <= array.max() < 1 << 31:
            raise InvalidValueError(f"Token ids must be from 0 to {(1 << 31) - 1}, got {array.min()} to {array.max()}.")
        array = np.ascontiguousarray(array, "<i4")
        content = hashlib.sha256(array.tobytes()).hexdigest()[:32]
        counted = None if answers is None else _counted(answers, array)
        mask = [] if counted is None else ["answers", hashlib.sha256(counted.tobytes()).hexdigest()[:32]]
        about = {"join": "eos", "content": content, "tokenizer": None, "fingerprint": digest([FORMAT, "ids", content, list(prefix), *mask])}
        documents = np.asarray([0, array.size], "<u8")
        return cls(array, documents, "eos", prefix=tuple(prefix), counted=counted, about=about | {"sources": [{"kind": "ids"}]})

    def with_prefix(self, prefix: Sequence[int]) -> Corpus:
        """Return the same ids with another prefix, () for none. Ids at the start that are the prefix are left out."""
        if tuple(prefix) == self.prefix:
            return self
        ids, documents, counted, length = self.ids, self.documents, self.counted, len(prefix)
        if length and ids[:length].tolist() == list(prefix):
            ids, documents = ids[length:], np.maximum(np.asarray(documents, np.int64) - length, 0)
            counted = None if counted is None else counted[length:]
        about = self._about | {"fingerprint": digest([self.fingerprint, "prefix", list(prefix)])}
        counts = None if self.bytes is None or self.joined_bytes is None else (self.bytes, self.joined_bytes)
        return Corpus(ids, documents, self.join, prefix=tuple(prefix), byte_counts=counts, counted=counted, about=about)

    def identity(self) -> dict[str, Any]:
        """Return what decides about the ids as short flat JSON: fingerprints of content and tokenizer, joining, counts."""
        tokenizer = self._about["tokenizer"]
        return {
            "fingerprint": self.fingerprint,
            "content": self._about["content"],
            "tokenizer": tokenizer["fingerprint"] if tokenizer else None,
            "join": self.join,
            "documents": len(self.documents) - 1,
            "tokens": self.tokens,
            **({} if self.counted is None else {"counted": self.counted_tokens}),
        }

    def describe(self) -> dict[str, Any]:
        """Return all facts as JSON: `identity`, the sources with their hashes, the tokenizer, bytes."""
        return self._about | {
            "documents": len(self.documents) - 1,
            "tokens": self.tokens,
            "counted": self.counted_tokens,
            "bytes": self.bytes,
            "joined_bytes": self.joined_bytes,
            "prefix": list(self.prefix),
        }


def open_corpus(
    sources: str | Path | Source | Sequence[str | Path | Source],
    tokenizer: Any,
    *,
    field: str = "text",
    join: Join = "eos",
    cache_dir: str | Path | None = None,
    split: str = "train",
    max_tokens: int | None = None,
    loss_on: LossOn = "all",
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Return the tokens of texts. The first call tokenizes them; later calls, also of other processes, read them from the cache.

    Args:
        sources: files, folders, ids of hub data sets, or Sources, as for `find_sources`.
        tokenizer: tokenizer of the model: transformers', mlx-lm's, or any object with `encode(text)`.
        field: field of JSON Lines, or column of tables, with the text. "messages" may hold conversations, which the tokenizer's chat template turns
            into text; a record with "prompt" and "completion" in its place is a conversation too.
        join: how documents follow each other: 'eos' or 'packed', see the top of this file.
        cache_dir: folder of the cache. None = $METALENS_CACHE, else ~/.cache/metalens/tokens.
        split: split of hub data sets.
        max_tokens: number of tokens after which reading stops (a document, or a part of a long text, later), of those that count in the loss. Large
            data sets need it.
        loss_on: tokens whose prediction counts in the loss: 'all', or the 'answers' of conversations, with the token that ends each.
        workers: number of processes that tokenize, useful for slow tokenizers; see `tokenizing.encoded`. They do not change the result.
        progress: function that is called while tokenizing, with the number of new tokens: 0 at the start, and after every batch.

    Raises:
        InvalidValueError: if there is no text, or the text is faulty, or its answers cannot be found: names the place and the remedy.
        OSError: if a file can't be read or the cache can't be written.
    """
    if join not in ("eos", "packed"):
        raise InvalidValueError(f"join must be 'eos' or 'packed', got {join!r}.")
    if loss_on not in get_args(LossOn):
        raise InvalidValueError(f"loss_on must be 'all' or 'answers', got {loss_on!r}.")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidValueError(f"max_tokens must be positive, got {max_tokens}.")
    text = TextTokenizer(tokenizer)
    if join == "eos" and text.eos is None:
        raise InvalidValueError("The tokenizer has no EOS token to join documents with. Use join='packed'.")
    found = find_sources(sources, field=field, split=split)
    cache = TokenCache(cache_dir)
    identities = [source.identity(cache) for source in found]
    about_tokenizer, content = text.describe(), digest([identities, max_tokens])
    rules = ["the prefix once"] if text.prefix else []  # since 0.2.0; tokens of tokenizers without a prefix are as before
    if any(map(_may_be_cut, found, identities)):
        rules.append("long documents in parts")  # since 0.2.0: some tokenizers give other ids beside a cut
    if (field in CHAT_FIELDS or any(isinstance(source, ChatList) for source in found)) and text.chat_template:
        rules.append(text.chat_template)
    if loss_on == "answers":
        rules.append("loss on answers")
    fingerprint = digest([FORMAT, *rules, join, about_tokenizer["fingerprint"], content])
    stored = cache.open(fingerprint)
    if stored is None:
        with cache.lock(fingerprint):
            stored = cache.open(fingerprint) or _tokenize(cache, fingerprint, found, text, join, max_tokens, loss_on, workers, progress)
    about = {
        "fingerprint": fingerprint,
        "content": content,
        "tokenizer": about_tokenizer,
        "join": join,
        "max_tokens": max_tokens,
        "sources": [{"name": source.name} | identity for source, identity in zip(found, identities, strict=True)],
    }
    byte_counts = (stored.counts["bytes"], stored.counts["joined_bytes"])
    corpus = Corpus(stored.ids, stored.documents, join, prefix=text.prefix, byte_counts=byte_counts, counted=stored.counted, about=about)
    if not corpus.counted_tokens:
        raise InvalidValueError("There is no answer in the conversations: no message of the role 'assistant', and no completion. Give others.")
    return corpus


def _counted(answers: Any, ids: np.ndarray) -> np.ndarray:
    """Return at which of the ids [tokens] the prediction counts, from the caller's mask of answers."""
    mask = np.asarray(answers)
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise InvalidValueError(f"The mask of the answers must be true or false for each of the {ids.size} ids; it is {mask.dtype} {mask.shape}.")
    counted = np.append(mask[1:].astype(bool), False)
    if not counted.any():
        raise InvalidValueError("The mask of the answers has no true value, or only for the first token, which nothing predicts. Mark some tokens.")
    return counted


def _may_be_cut(source: Source, identity: Mapping[str, Any]) -> bool:
    """Return whether a source may have a document that is tokenized in parts now and was not before 0.2.0. Text files always were."""
    if isinstance(source, TextFile):
        return False
    compressed = isinstance(source, ParquetFile) or (isinstance(source, FileSource) and source.path.suffix == ".gz")
    return compressed or int(identity.get("bytes", BLOCK + 1)) > BLOCK


def _tokenize(
    cache: TokenCache,
    key: str,
    sources: list[Source],
    tokenizer: TextTokenizer,
    join: Join,
    max_tokens: int | None,
    loss_on: LossOn,
    workers: int | None,
    progress: Callable[[int], None] | None,
) -> StoredTokens:
    separator = np.asarray([tokenizer.eos] if join == "eos" else [], tokenizer.dtype)
    separator_bytes = len(tokenizer.eos_text.encode()) if join == "eos" else 0
    counts = {"bytes": 0, "joined_bytes": 0}
    spelled: list[bool] = []

    def pieces() -> Iterator[Piece]:
        for source in sources:
            for piece in source.pieces():
                yield from tokenizer.rendered(piece, loss_on == "answers")
            source.require_unchanged()

    def documents() -> Iterator[tuple[np.ndarray, bool, np.ndarray | None]]:
        tokens = 0  # that count
        if progress is not None:
            progress(0)  # it begins: the first batch may take a while
        for batch, rows in encoded(tokenizer, pieces(), workers):
            before = tokens
            for piece, (plain, in_answers) in zip(batch, rows, strict=True):
                row = tokenizer.without_prefix(plain) if piece.starts else plain
                if row.size < plain.size and not spelled and piece.chat is None:
                    spelled.append(True)
                    warn_caller("Documents begin with the special tokens that go before every sequence; they are read once.")
                ids = np.concatenate([separator, row]) if piece.starts else row
                answers: np.ndarray | None = None
                if in_answers is not None:
                    answers = np.concatenate([np.zeros(ids.size - row.size, bool), in_answers[plain.size - row.size :]])
                    if piece.starts and join == "packed":
                        answers[:1] = False  # no token of the document is before it
                size = len(piece.text.encode())
                counts["bytes"] += size
                counts["joined_bytes"] += size + separator_bytes * piece.starts
                tokens += ids.size if answers is None else int(np.count_nonzero(answers))
                yield ids, piece.starts, answers
                if max_tokens is not None and tokens >= max_tokens:
                    break
            if progress is not None:
                progress(tokens - before)
            if max_tokens is not None and tokens >= max_tokens:
                return

    return cache.write(key, tokenizer.dtype, documents(), counts)
