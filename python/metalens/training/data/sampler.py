"""Which sequences a training step sees: every token once per epoch, in an order that a position and a seed determine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalens.training.data.corpus import Corpus
from metalens.utils.errors import InvalidValueError


class NotEnoughDataError(InvalidValueError):
    """The text ends before the training does."""


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step.

    Attributes:
        sequences: int32 [t] each, this rank's share.
        tokens: of all ranks together.
        state: of the sampler after this step, for a checkpoint written after it.
    """

    sequences: list[np.ndarray]
    tokens: int
    state: dict[str, Any]


class Sampler:
    """Cuts a corpus into sequences and hands them out.

    Sequences hold at most `length` tokens, begin with the corpus's prefix, do not overlap, and hold together every token of the corpus once. The
    last one (of each document, if the corpus is packed) is shorter if it must be, down to one token: KL has a value at every position.

    A position is (epoch, index) and nothing else: the order of an epoch follows from seed and epoch, through PCG64's raw numbers, which NumPy
    promises never to change.

    Args:
        corpus: the tokens.
        length: of the sequences, the prefix included.
        seed: shuffles the sequences anew in every epoch; None keeps their order.
        repeat: whether another epoch follows when one ends.

    Raises:
        ValueError: if no token fits into a sequence, or the seed is negative.
    """

    def __init__(self, corpus: Corpus, length: int, *, seed: int | None = None, repeat: bool = False) -> None:
        room = length - len(corpus.prefix)
        if room < 1:
            raise InvalidValueError(
                f"Sequences of {length} tokens have no room for text: every one begins with {len(corpus.prefix)} special tokens. Raise the length."
            )
        if seed is not None and seed < 0:
            raise InvalidValueError(f"seed must not be negative, got {seed}.")
        self.corpus = corpus
        self.length = int(length)
        self.seed = None if seed is None else int(seed)  # NumPy's integers are no JSON
        self.repeat = repeat
        self.epoch = 0
        self.index = 0
        self._prefix = np.asarray(corpus.prefix, np.int32)
        bounds = np.asarray([0, corpus.tokens] if corpus.join == "eos" else corpus.documents, np.int64)
        pieces = -(-np.diff(bounds) // room)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = np.repeat(bounds[:-1], pieces) + room * (np.arange(pieces.sum()) - first)
        self._ends = np.minimum(self._starts + room, np.repeat(bounds[1:], pieces))
        self._sizes = self._ends - self._starts + len(corpus.prefix)
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return len(self._starts)

    @property
    def total_tokens(self) -> int:
        """Tokens in an epoch, prefixes included: every one is a row that the lens trains on."""
        return int(self._sizes.sum())

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = np.arange(len(self))
            if self.seed is not None:
                order = np.argsort(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self)), kind="stable")
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def _sequence(self, i: int) -> np.ndarray:
        return np.concatenate([self._prefix, self.corpus.ids[self._starts[i] : self._ends[i]]], dtype=np.int32, casting="unsafe")

    def take_step(self, tokens: int, rank: int = 0, world: int = 1) -> Step:
        """The next whole sequences, until they hold at least so many tokens.

        Every rank must make the same calls: each moves on by the whole step, which does not depend on their number, and gets a share of its own
        (every world-th sequence; a small step may have none for some).

        Args:
            tokens: of all ranks together, at least 1.
            rank: which share, from 0.
            world: number of shares.

        Raises:
            NotEnoughDataError: if the text ends before and does not repeat. The position stays as it was.
        """
        if tokens < 1 or not 0 <= rank < world:
            raise InvalidValueError(f"Expected at least one token and a rank from 0 to world - 1, got tokens={tokens}, rank={rank}, world={world}.")
        epoch, index, count = self.epoch, self.index, 0
        taken: list[int] = []
        while count < tokens:
            if index == len(self):
                if not self.repeat:
                    raise self._too_short(tokens, 1)
                epoch, index = epoch + 1, 0
            i = int(self._order(epoch)[index])
            taken.append(i)
            count += int(self._sizes[i])
            index += 1
        self.epoch, self.index = epoch, index
        return Step([self._sequence(i) for i in taken[rank::world]], count, self.state())

    def take_tokens(self, n: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
        """The sequences of `take_step`."""
        return self.take_step(n, rank, world).sequences

    def remaining_tokens(self) -> int:
        """Tokens from here to the end of the epoch."""
        return int(self._sizes[self._order(self.epoch)[self.index :]].sum())

    def require(self, tokens: int, steps: int = 1) -> None:
        """Find out now whether so many steps of so many tokens can be taken from here.

        Raises:
            NotEnoughDataError: if not.
        """
        if self.repeat:
            return
        ends = np.cumsum(self._sizes[self._order(self.epoch)[self.index :]])
        position = 0
        for _ in range(steps):
            before = int(ends[position - 1]) if position else 0
            position = int(np.searchsorted(ends, before + tokens)) + 1
            if position > len(ends):
                raise self._too_short(tokens, steps)

    def _too_short(self, tokens: int, steps: int) -> NotEnoughDataError:
        need = f"{steps} steps of at least {tokens} tokens, in whole sequences of up to {self.length}" if steps > 1 else f"{tokens} tokens"
        left = self.remaining_tokens()
        there = f"there are {left}" if left == self.total_tokens else f"{left} of {self.total_tokens} are left"
        return NotEnoughDataError(
            f"Not enough text: {need} are needed ({tokens * steps} tokens), {there}. "
            "Give more text, train for fewer or smaller steps, or allow the text to repeat (repeat=True)."
        )

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in; JSON."""
        return {"epoch": self.epoch, "index": self.index, "seed": self.seed, "length": self.length, "corpus": self.corpus.identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a `state` was taken: what follows is what followed there.

        Raises:
            ValueError: if this sampler's corpus, length or seed are others (names them), or it is no state.
        """
        try:
            theirs = {"seed": state["seed"], "length": state["length"]} | {f"corpus {k}": v for k, v in dict(state["corpus"]).items()}
            epoch, index = int(state["epoch"]), int(state["index"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValueError(f"This is not the state of a sampler ({error!r}).") from error
        ours = {"seed": self.seed, "length": self.length} | {f"corpus {k}": v for k, v in self.corpus.identity().items()}
        differ = [f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in ours if theirs.get(name) != ours[name]]
        if differ:
            raise InvalidValueError(
                f"The data are not those that the position belongs to: {'; '.join(differ)}. Give the same text, tokenizer and settings."
            )
        if epoch < 0 or not 0 <= index <= len(self):
            raise InvalidValueError(f"There is no position {index} in epoch {epoch}: an epoch has {len(self)} sequences.")
        self.epoch, self.index = epoch, index


def batches(sizes: Iterable[int], tokens: int) -> list[list[int]]:
    """Which sequences go through the model together: those of equal length.

    Args:
        sizes: of the sequences.
        tokens: at most so many in a batch, unless one sequence has more.

    Returns:
        The numbers of sequences, each once, ascending in a batch; batches of one length after another, in the order in which these first occur.
    """
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    found = []
    for size, group in groups.items():
        together = max(1, tokens // size)
        found += [group[start : start + together] for start in range(0, len(group), together)]
    return found
