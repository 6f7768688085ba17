"""Tokenizers for a corpus: plain ids, the ids that belong before every text, and a fingerprint of everything that decides about ids."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from metalens.models.plain_encoder import PlainEncoder
from metalens.training.data.answers import rendered_answers
from metalens.training.data.readers import BLOCK, Piece, parts
from metalens.utils.errors import InvalidValueError

# A text whose ids show differences between tokenizers that neither a vocabulary nor a serialized tokenizer shows.
PROBE = "  Zwölf Boxkämpfer\tjagen 3.14159 foxes' \u4f60\u597d\n\nat  night — 'tis\r\n"

BATCH = 1024  # pieces that are tokenized together; fewer if they are long


def digest(value: Any) -> str:
    """Return a short hash of a JSON value: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


class Tokens(NamedTuple):
    """The tokens of a piece.

    Attributes:
        ids: token ids [tokens].
        answers: whether each belongs to an answer, bool [tokens]. None = nobody asked.
    """

    ids: np.ndarray
    answers: np.ndarray | None


class TextTokenizer:
    """A tokenizer of transformers or mlx-lm, or any object with `encode(text)`.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        tokenizer: the tokenizer without mlx-lm's wrapper.
        eos: id of the end-of-sequence token, or None.
        eos_text: text of that token, "" if there is none.
        prefix: ids that the tokenizer puts before every text, as a rule a beginning-of-sequence token; often none.
        largest: largest id, or None if the tokenizer does not tell.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._plain = PlainEncoder(tokenizer)
        self.tokenizer = self._plain.tokenizer
        eos = getattr(tokenizer, "eos_token_id", None)
        self.eos: int | None = None if eos is None else int(eos)
        self.eos_text = str(getattr(self.tokenizer, "eos_token", None) or "")
        self.prefix = self._plain.prefix
        self.largest = self._largest()

    def _largest(self) -> int | None:
        try:
            return max(map(int, self.tokenizer.get_vocab().values()))
        except (AttributeError, NotImplementedError, ValueError):
            return None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of stored ids: little-endian uint16 if it holds every id, else uint32."""
        return np.dtype("<u2" if self.largest is not None and self.largest < 1 << 16 else "<u4")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids [tokens] of each text, without the special tokens that the tokenizer adds. They do not depend on the other texts.

        Raises:
            InvalidValueError: if an id is not from 0 to `largest`.
        """
        return [self._checked(np.asarray(row, dtype=np.int64)) for row in self._plain.encode(texts)]

    @property
    def chat_template(self) -> str:
        """Return the chat template; "" if the tokenizer has none."""
        return self._plain.chat_template

    def rendered(self, piece: Piece, with_answers: bool = False) -> Iterator[Piece]:
        """Yield a piece as text: a conversation in the chat template, long ones in parts.

        Args:
            piece: the piece.
            with_answers: also find the characters of the answers.

        Raises:
            InvalidValueError: if the template refuses the conversation, or if answers are asked for and cannot be found; names the place.
        """
        if piece.chat is None:
            if with_answers:
                raise InvalidValueError(
                    f"{piece.where}: this is plain text, and the loss is to count the answers of conversations alone. Name the field with the "
                    "messages (field='messages'), or count all tokens (loss_on='all')."
                )
            yield piece
            return
        try:
            text, answers = rendered_answers(self._plain, piece.chat) if with_answers else (self._plain.chat_text(piece.chat.messages), [])
        except InvalidValueError as error:
            raise InvalidValueError(f"{piece.where}: {error}") from error
        start = 0
        for part in parts(text):
            size = len(part.text)
            inside = [(max(first - start, 0), min(end - start, size)) for first, end in answers if first < start + size and end > start]
            yield piece._replace(text=part.text, starts=part.starts, answers=inside if with_answers else None)
            start += size

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[Tokens]:
        """Return the ids of each piece as `encode` does, and which of them belong to answers.

        A token belongs to an answer if it has a character of it.
        """
        rows = self.encode([piece.text for piece in pieces])
        return [Tokens(ids, None if piece.answers is None else self._in_answers(piece, ids)) for piece, ids in zip(pieces, rows, strict=True)]

    def _in_answers(self, piece: Piece, ids: np.ndarray) -> np.ndarray:
        """Return whether each of the ids [tokens] of a piece belongs to an answer."""
        cuts = sorted({0, len(piece.text), *(cut for span in piece.answers or () for cut in span)})
        rows = self.encode([piece.text[start:end] for start, end in pairwise(cuts)])
        if np.array_equal(np.concatenate([ids[:0], *rows]), ids):  # as a rule: special tokens stand around an answer
            first = last = dict(zip(cuts, [0, *np.cumsum([row.size for row in rows])], strict=True))
        else:
            first, last = self._plain_cuts(piece.text, cuts, ids)
        found = np.zeros(ids.size, bool)
        for start, end in piece.answers or ():
            if start < end:
                found[first[start] : last[end]] = True
        return found

    def _plain_cuts(self, text: str, cuts: Sequence[int], ids: np.ndarray) -> tuple[dict[int, int], dict[int, int]]:
        """Return for each cut of a text the tokens that end at or before it, and those that begin before it, where tokens go over the cuts.

        Without the offsets of a fast tokenizer, a token or two more than these may be taken for tokens over a cut.
        """
        offsets = self._plain.offsets(text)
        if offsets is not None and len(offsets) == ids.size:
            starts, ends = np.asarray(offsets).reshape(-1, 2).T
            return {cut: int(np.searchsorted(ends, cut, "right")) for cut in cuts}, {cut: int(np.searchsorted(starts, cut)) for cut in cuts}
        first, last = {}, {}
        for cut in cuts:
            common, size = self._in_common(text[:cut], ids)
            first[cut] = common
            end = cut
            while common < size:
                end += 1
                common, size = self._in_common(text[:end], ids)
            last[cut] = common
        return first, last

    def _in_common(self, start: str, ids: np.ndarray) -> tuple[int, int]:
        """Return how many of the first tokens of a text are those of the start of it, and the number of these."""
        (row,) = self.encode([start])
        size = min(row.size, ids.size)
        differ = np.flatnonzero(row[:size] != ids[:size])
        return int(differ[0]) if differ.size else size, row.size

    def without_prefix(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids [tokens] of a document without the prefix, if the document spells it itself."""
        found: np.ndarray = self._plain.without_prefix(ids)
        return found

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        limit = np.iinfo(self.dtype).max
        if ids.size and not 0 <= ids.min() <= ids.max() <= limit:
            raise InvalidValueError(
                f"The tokenizer gave ids from {ids.min()} to {ids.max()}; expected 0 to {limit}. Check whether its vocabulary is damaged."
            )
        return ids.astype(self.dtype)

    def describe(self) -> dict[str, Any]:
        """Return class, name, EOS, prefix and fingerprint as flat JSON."""
        return {
            "class": type(self.tokenizer).__name__,
            "name": str(getattr(self.tokenizer, "name_or_path", "")),
            "eos": self.eos,
            "prefix": list(self.prefix),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary, the rules (of a fast tokenizer), the special tokens, the class, and the ids of a probe."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and hasattr(backend, "to_str"):
            content = json.loads(backend.to_str())
            # The last call of the tokenizer set these; they have no effect here.
            content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        else:
            try:
                content = self.tokenizer.get_vocab()
            except (AttributeError, NotImplementedError):
                content = getattr(self.tokenizer, "vocab_size", None)
        probe = [int(i) for i in self.encode([PROBE])[0]]
        return digest([type(self.tokenizer).__name__, self.eos, self.eos_text, list(self.prefix), probe, content])


Encoded = tuple[list[Piece], list[Tokens]]


def batches_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces in lists of at most BATCH pieces and little more than BLOCK characters."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BLOCK or len(batch) == BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(tokenizer: TextTokenizer, pieces: Iterable[Piece], workers: int | None = None) -> Iterator[Encoded]:
    """Yield batches of pieces with their ids, in the order of the pieces, the same for any number of workers.

    Args:
        tokenizer: the tokenizer, picklable if there are workers.
        pieces: the pieces to tokenize.
        workers: number of processes. None or 1 = this process, where the threads of fast tokenizers use all cores already; more help slow
            tokenizers. They are spawned: a script must guard its own start with `if __name__ == "__main__"`.
    """
    if workers is None or workers <= 1:
        for batch in batches_of(pieces):
            yield batch, tokenizer.encode_pieces(batch)
        return
    # Spawned: a fork would lack the threads of MLX and of fast tokenizers.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (pickle.dumps(tokenizer),))
    with pool:
        waiting: deque[tuple[list[Piece], Future[list[Tokens]]]] = deque()
        try:
            for batch in batches_of(pieces):
                # The messages stay here.
                waiting.append((batch, pool.submit(_encode_in_worker, [piece._replace(chat=None) for piece in batch])))
                if len(waiting) > 2 * workers:
                    first, ids = waiting.popleft()
                    yield first, ids.result()
            while waiting:
                first, ids = waiting.popleft()
                yield first, ids.result()
        finally:
            for _, ids in waiting:
                ids.cancel()


_worker_tokenizer: TextTokenizer | None = None


def _start_worker(tokenizer: bytes) -> None:
    global _worker_tokenizer  # noqa: PLW0603 - one tokenizer per process, sent once
    _worker_tokenizer = pickle.loads(tokenizer)


def _encode_in_worker(pieces: list[Piece]) -> list[Tokens]:
    assert _worker_tokenizer is not None
    return _worker_tokenizer.encode_pieces(pieces)
