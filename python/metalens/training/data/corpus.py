"""A text as token ids on disk: tokenized once, opened at once.

Conventions. Documents are tokenized without special tokens.
- join="eos": every document is preceded by the tokenizer's EOS token and all follow each other in one stream, which sequences are cut from across
  documents: EOS d1 EOS d2 ... (tuned-lens's convention; the ids are those of its joined text).
- join="packed": no separators, and no sequence crosses the end of a document.
A beginning-of-sequence token is never in the stream: what the tokenizer puts before a text is `Corpus.prefix`, and the sampler puts it before every
sequence. That is what models with such a token have seen in training, and what tuned-lens trains on. What a tokenizer puts after a text is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metalens.models.tokenization import as_token_ids
from metalens.training.data.cache import StoredTokens, TokenCache
from metalens.training.data.readers import Piece, Source
from metalens.training.data.sources import find_sources
from metalens.training.data.tokenizing import TextTokenizer, digest, encoded
from metalens.utils.errors import InvalidTypeError, InvalidValueError

Join = Literal["eos", "packed"]
FORMAT = 1  # raise it when the same text and tokenizer come to give other tokens


class Corpus:
    """Token ids and where they come from. Made by `open_corpus` or `from_ids`.

    Attributes:
        ids: [tokens], of an unsigned or int32 type; a memory map if it is from the cache.
        documents: [documents + 1], the first token of each document (with join="eos" its EOS), and the number of tokens.
        prefix: ids that belong before every sequence and are not in `ids`.
        join: "eos" or "packed", as above.
        bytes: UTF-8 bytes of the documents, what bits per byte are about; None for ids without text.
        joined_bytes: the same with the EOS tokens as text between them: tuned-lens divides by this.
        fingerprint: changes whenever the text, the tokenizer or the joining does.
    """

    def __init__(
        self,
        ids: np.ndarray,
        documents: np.ndarray,
        join: Join,
        *,
        prefix: tuple[int, ...] = (),
        byte_counts: tuple[int, int] | None = None,
        about: dict[str, Any],
    ) -> None:
        self.ids = ids
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
        """How many ids there are, `prefix` not counted."""
        return int(self.ids.size)

    @classmethod
    def from_ids(cls, ids: Any, *, prefix: Sequence[int] = ()) -> Corpus:
        """One stream of ids [tokens] that are at hand (an array of NumPy or MLX, or a list); joined as it is, and one document.

        Raises:
            TypeError: if they are not integers.
            ValueError: if they are not one-dimensional, not ids, or none.
        """
        array = as_token_ids(ids)
        if array.dtype.kind not in "iu":
            raise InvalidTypeError(
                f"Token ids must be integers, got {array.dtype}." if array.size else "There are no token ids. Provide text that is not empty."
            )
        if array.ndim != 1 or not array.size:
            raise InvalidValueError(f"Token ids must be [tokens] and not empty, got {array.shape}.")
        if not 0 <= array.min() <= array.max() < 1 << 31:
            raise InvalidValueError(f"Token ids must be within 0 and {(1 << 31) - 1}, got {array.min()} to {array.max()}.")
        array = np.ascontiguousarray(array, "<i4")
        content = hashlib.sha256(array.tobytes()).hexdigest()[:32]
        about = {"join": "eos", "content": content, "tokenizer": None, "fingerprint": digest([FORMAT, "ids", content, list(prefix)])}
        return cls(array, np.asarray([0, array.size], "<u8"), "eos", prefix=tuple(prefix), about=about | {"sources": [{"kind": "ids"}]})

    def identity(self) -> dict[str, Any]:
        """What decides about the ids, short and as flat JSON: fingerprints of content and tokenizer, joining, counts."""
        tokenizer = self._about["tokenizer"]
        return {
            "fingerprint": self.fingerprint,
            "content": self._about["content"],
            "tokenizer": tokenizer["fingerprint"] if tokenizer else None,
            "join": self.join,
            "documents": len(self.documents) - 1,
            "tokens": self.tokens,
        }

    def describe(self) -> dict[str, Any]:
        """All of it, as JSON: `identity`, the sources with their hashes, the tokenizer, bytes."""
        return self._about | {
            "documents": len(self.documents) - 1,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "joined_bytes": self.joined_bytes,
            "prefix": list(self.prefix),
        }


def open_corpus(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any,
    *,
    field: str = "text",
    join: Join = "eos",
    cache_dir: str | Path | None = None,
    split: str = "train",
    max_tokens: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """The tokens of texts; tokenized by the first call, read from the cache by later ones, in whatever process.

    Args:
        sources: files, folders, ids of hub data sets, as for `find_sources`.
        tokenizer: of the model; transformers', mlx-lm's, or anything with `encode(text)`.
        field: field of JSON Lines and column of tables that has the text.
        join: how documents follow each other, see the top of this file.
        cache_dir: default: $METALENS_CACHE, else ~/.cache/metalens/tokens.
        split: of hub data sets.
        max_tokens: stop reading once there are so many (a part of a long text or a document more): what large data sets need.
        workers: processes to tokenize with, useful for slow tokenizers; see `tokenizing.encoded`. Does not change the result.
        progress: called while tokenizing, with the number of new tokens.

    Raises:
        ValueError: if there is no text, or something is wrong with it: says where, and what to do.
        OSError: if a file can't be read or the cache can't be written.
    """
    if join not in ("eos", "packed"):
        raise InvalidValueError(f"join must be 'eos' or 'packed', got {join!r}.")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidValueError(f"max_tokens must be positive, got {max_tokens}.")
    text = TextTokenizer(tokenizer)
    if join == "eos" and text.eos is None:
        raise InvalidValueError("The tokenizer has no EOS token to join documents with. Use join='packed'.")
    found = find_sources(sources, field=field, split=split)
    cache = TokenCache(cache_dir)
    identities = [source.identity(cache) for source in found]
    about_tokenizer, content = text.describe(), digest([identities, max_tokens])
    fingerprint = digest([FORMAT, join, about_tokenizer["fingerprint"], content])
    stored = cache.open(fingerprint)
    if stored is None:
        with cache.lock(fingerprint):
            stored = cache.open(fingerprint) or _tokenize(cache, fingerprint, found, text, join, max_tokens, workers, progress)
    about = {
        "fingerprint": fingerprint,
        "content": content,
        "tokenizer": about_tokenizer,
        "join": join,
        "max_tokens": max_tokens,
        "sources": [{"name": source.name} | identity for source, identity in zip(found, identities, strict=True)],
    }
    byte_counts = (stored.counts["bytes"], stored.counts["joined_bytes"])
    return Corpus(stored.ids, stored.documents, join, prefix=text.prefix, byte_counts=byte_counts, about=about)


def _tokenize(
    cache: TokenCache,
    key: str,
    sources: list[Source],
    tokenizer: TextTokenizer,
    join: Join,
    max_tokens: int | None,
    workers: int | None,
    progress: Callable[[int], None] | None,
) -> StoredTokens:
    separator = np.asarray([tokenizer.eos] if join == "eos" else [], tokenizer.dtype)
    separator_bytes = len(tokenizer.eos_text.encode()) if join == "eos" else 0
    counts = {"bytes": 0, "joined_bytes": 0}

    def pieces() -> Iterator[Piece]:
        for source in sources:
            yield from source.pieces()
            source.require_unchanged()

    def documents() -> Iterator[tuple[np.ndarray, bool]]:
        tokens = 0
        for batch, rows in encoded(tokenizer, pieces(), workers):
            before = tokens
            for piece, row in zip(batch, rows, strict=True):
                ids = np.concatenate([separator, row]) if piece.starts else row
                size = len(piece.text.encode())
                counts["bytes"] += size
                counts["joined_bytes"] += size + separator_bytes * piece.starts
                tokens += ids.size
                yield ids, piece.starts
                if max_tokens is not None and tokens >= max_tokens:
                    break
            if progress is not None:
                progress(tokens - before)
            if max_tokens is not None and tokens >= max_tokens:
                return

    return cache.write(key, tokenizer.dtype, documents(), counts)
