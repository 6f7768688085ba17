"""Sequences for training steps: every token once per epoch, in an order that a position and a seed determine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metalens.training.config import HELD_BACK
from metalens.training.data.corpus import Corpus
from metalens.utils.errors import InvalidValueError

# Places in the text from which pieces are held back. Few, so that a piece has the positions of a sequence: with 16 pieces of 32 tokens Gemma 3 looked
# worse after training at all layers, and with 4 of 128 it did not (6,144 tokens: 1.87 and 1.66 nats). The price: on source code, where a piece is
# peculiar, `fast` ended 2 % higher with 4 pieces than with 16 (demo model).
MOST_HELD = 4
MIN_HELD = 16  # least tokens of one of them


class NotEnoughDataError(InvalidValueError):
    """The text ends before the training does.

    Args:
        shortage: the tokens that are needed and those there are, in a sentence.
        changes: settings with which the text suffices, [{setting: value}, ...], the smallest change first.
        advice: what to do, in a sentence. None = worded from `changes`.

    Attributes:
        shortage, changes: as given.
    """

    def __init__(self, shortage: str, changes: Sequence[Mapping[str, Any]] = (), advice: str | None = None) -> None:
        self.shortage = shortage
        self.changes = [dict(change) for change in changes]
        if advice is None:
            advice = "Give more text"
            if changes:
                options = "; ".join(", ".join(f"{name}={value!r}" for name, value in change.items()) for change in changes)
                advice += f", or one of: {options}"
            advice += "."
        super().__init__(f"{shortage} {advice}")


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step.

    Attributes:
        sequences: the sequences of this rank, int32 [t] each.
        tokens: number of tokens of all ranks together, of those that count in the loss.
        state: state of the sampler after this step, for a checkpoint that is written then.
        counted: whether the prediction at each token of each sequence counts, bool [t]. None = at every token.
        starts: number of each sequence's first token that counts, among those of the step, of all ranks. () = not known.
        positions: place of each token that counts in its sequence, of all ranks, int [tokens]. Empty = not known.
    """

    sequences: list[np.ndarray]
    tokens: int
    state: dict[str, Any]
    counted: list[np.ndarray] | None = None
    starts: Sequence[int] = ()
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Sampler:
    """Cuts a corpus into sequences and hands them out.

    Sequences hold at most `length` tokens, begin with the prefix of the corpus and do not overlap. Together they hold every token of the corpus
    once. The last sequence (of each document, if the corpus is packed) may be shorter, down to one token: KL has a value at every position.

    If only some tokens of the corpus count in the loss, numbers of tokens are numbers of these, and sequences without one are left out. The prefix
    does not count then.

    A position is (epoch, index) and nothing else. The order of an epoch follows from the seed and the epoch, through the raw numbers of PCG64,
    which NumPy promises never to change.

    Args:
        corpus: the tokens.
        length: tokens per sequence, the prefix included.
        seed: seed that shuffles the sequences, anew in every epoch. None = the order of the text.
        repeat: begin another epoch when one ends.
        held_back: tokens to leave out of every epoch, see `held_back_step`, in pieces from MOST_HELD places or fewer, at most one for HELD_BACK
            sequences. They follow from the corpus alone. If the corpus is one text and all of it counts, the sequences are laid out around the
            pieces, so that nothing else is left out. Else whole sequences are left out, and a piece is the first part of each.
        shift: positions from a token to its partner in the loss, see `training.objective`. Pieces are longer by so many tokens.

    Raises:
        InvalidValueError: if no token fits into a sequence, or the seed is negative.
    """

    def __init__(self, corpus: Corpus, length: int, *, seed: int | None = None, repeat: bool = False, held_back: int = 0, shift: int = 0) -> None:
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
        self.held_back, self.shift = held_back, shift
        bounds = np.asarray([0, corpus.tokens] if corpus.join == "eos" else corpus.documents, np.int64)
        pieces = -(-np.diff(bounds) // room)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = np.repeat(bounds[:-1], pieces) + room * (np.arange(pieces.sum()) - first)
        self._ends = np.minimum(self._starts + room, np.repeat(bounds[1:], pieces))
        self._held = np.zeros(0, np.int64)
        whole = corpus.join == "eos" and corpus.counted is None
        if whole:
            self._lay_around_pieces(room)
        self._sizes = self._ends - self._starts + len(corpus.prefix)  # tokens that count
        if corpus.counted is not None:
            self._sizes = np.add.reduceat(corpus.counted, self._starts, dtype=np.int64)
            some = self._sizes > 0
            self._starts, self._ends, self._sizes = self._starts[some], self._ends[some], self._sizes[some]
        if not whole:
            self._held = _places(len(self._starts), self._pieces())
        self._shuffled: tuple[int, np.ndarray] | None = None

    def _pieces(self) -> int:
        """Return the number of pieces to hold back."""
        return min(MOST_HELD, self.held_back // MIN_HELD, len(self._starts) // HELD_BACK)

    def _lay_around_pieces(self, room: int) -> None:
        """Lay the sequences of one text out anew, with a piece that is held back before the sequence at each chosen place."""
        count, tokens = self._pieces(), self.corpus.tokens
        piece = min(self.held_back // max(count, 1) + abs(self.shift) - len(self._prefix), room)
        if piece < 1 or not count:
            return
        sequences = -(-(tokens - piece * count) // room)
        before = _places(sequences, count)
        lengths = np.insert(np.full(sequences, room), before, piece)
        self._starts = np.cumsum(lengths) - lengths
        self._ends = np.minimum(self._starts + lengths, tokens)
        self._held = before + np.arange(count)

    def held_back_step(self) -> Step:
        """Return the sequences that no epoch has, cut so that at most `held_back` tokens of them count; none where the text is too short.

        With a shift only tokens with a partner count, and a cut leaves them theirs. Sequences without such a token are left out.
        """
        shift = self.shift
        share = self.held_back // max(len(self._held), 1)
        sequences, counted = [self._sequence(int(i)) for i in self._held], self._counted(self._held)
        if counted is None and not shift:
            sequences = [sequence[:share] for sequence in sequences]
            return Step(sequences, sum(sequence.size for sequence in sequences), self.state())
        cut, masks = [], []
        for sequence, mask in zip(sequences, counted or [np.ones(each.size, bool) for each in sequences], strict=True):
            partner = np.arange(sequence.size) + shift
            chosen = np.flatnonzero(mask & (partner >= 0) & (partner < sequence.size))[:share]
            if chosen.size:
                end = int(chosen[-1]) + 1 + max(shift, 0)
                cut.append(sequence[:end])
                masks.append(np.isin(np.arange(end), chosen))
        return Step(cut, int(sum(mask.sum() for mask in masks)), self.state(), masks)

    def __len__(self) -> int:
        """Return the number of sequences in an epoch."""
        return len(self._starts) - len(self._held)

    @property
    def total_tokens(self) -> int:
        """Return the number of tokens in an epoch, prefixes included, that the lens trains on: of those that count."""
        return int(self._sizes.sum() - self._sizes[self._held].sum())

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            n = len(self._starts)
            order = np.arange(n)
            if self.seed is not None:
                order = np.argsort(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(n), kind="stable")
            order = order[~np.isin(order, self._held)]
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def _sequence(self, i: int) -> np.ndarray:
        return np.concatenate([self._prefix, self.corpus.ids[self._starts[i] : self._ends[i]]], dtype=np.int32, casting="unsafe")

    def _counted(self, numbers: Iterable[int]) -> list[np.ndarray] | None:
        """Return whether the prediction at each token of some sequences counts, None if at every token."""
        mask, before = self.corpus.counted, np.zeros(self._prefix.size, bool)
        return None if mask is None else [np.concatenate([before, mask[self._starts[i] : self._ends[i]]]) for i in numbers]

    def _positions(self, numbers: Sequence[int]) -> np.ndarray:
        """Return the places of the tokens that count in their sequences."""
        masks = self._counted(numbers)
        if masks is None:
            return np.concatenate([np.arange(self._sizes[i]) for i in numbers])
        return np.concatenate([np.flatnonzero(mask) for mask in masks])

    def take_step(self, tokens: int, rank: int = 0, world: int = 1) -> Step:
        """Return the next whole sequences that together hold at least `tokens` tokens.

        Every rank must make the same calls. Each moves on by the whole step, which does not depend on the number of ranks, and gets every world-th
        sequence of it; a small step may have no sequence for some ranks.

        Args:
            tokens: tokens of all ranks together, at least 1.
            rank: number of this process, from 0.
            world: number of processes that divide the step.

        Raises:
            NotEnoughDataError: if the text ends before that and does not repeat. The position stays as it was.
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
        mine, sizes = taken[rank::world], self._sizes[taken]
        starts = (np.cumsum(sizes) - sizes)[rank::world]
        return Step([self._sequence(i) for i in mine], count, self.state(), self._counted(mine), starts.tolist(), self._positions(taken))

    def take_tokens(self, n: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
        """Return the sequences of `take_step`."""
        return self.take_step(n, rank, world).sequences

    def remaining_tokens(self) -> int:
        """Return the number of tokens from here to the end of the epoch."""
        return int(self._sizes[self._order(self.epoch)[self.index :]].sum())

    def require(self, tokens: int, steps: int = 1) -> None:
        """Check that the text from here on is long enough for `steps` steps of `tokens` tokens.

        Raises:
            NotEnoughDataError: if it is too short and does not repeat.
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
            f"Not enough text: {need} are needed ({tokens * steps} tokens), {there}.",
            advice="Give more text, train for fewer or smaller steps, or allow the text to repeat (repeat=True).",
        )

    def state(self) -> dict[str, Any]:
        """Return the position and the identity of the text that it belongs to, as JSON values."""
        held = {"held_back": self.held_back, "places": MOST_HELD} if self.held_back else {}
        return {"epoch": self.epoch, "index": self.index, "seed": self.seed, "length": self.length, **held, "corpus": self.corpus.identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`: the sequences that follow are those that followed there.

        Raises:
            InvalidValueError: if it belongs to another corpus, length or seed (names them) or to a version that holds other pieces back, or is no
                state.
        """
        try:
            theirs = {name: state[name] for name in ("seed", "length")} | {"held_back": state.get("held_back", 0)}
            theirs |= {f"corpus {k}": v for k, v in dict(state["corpus"]).items()}
            epoch, index = int(state["epoch"]), int(state["index"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValueError(f"This is not the state of a sampler ({error!r}).") from error
        ours = {"seed": self.seed, "length": self.length, "held_back": self.held_back}
        ours |= {f"corpus {k}": v for k, v in self.corpus.identity().items()}
        differ = [f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in ours if theirs.get(name) != ours[name]]
        if differ:
            raise InvalidValueError(
                f"The data are not those that the position belongs to: {'; '.join(differ)}. Use the same text, tokenizer and settings."
            )
        if self.held_back and state.get("places") != MOST_HELD:
            raise InvalidValueError(
                "Another version of metalens made this checkpoint: its guard holds other text back, and the run may have trained on this version's "
                f"{MOST_HELD} pieces. Go on from the last lens of that run with --from LENS (in Python start_from), or start again."
            )
        if epoch < 0 or not 0 <= index <= len(self):
            raise InvalidValueError(f"There is no position {index} in epoch {epoch}: an epoch has {len(self)} sequences.")
        self.epoch, self.index = epoch, index


def _places(n: int, count: int) -> np.ndarray:
    """Return `count` of the numbers below n, ascending: always the same."""
    return np.sort(np.argsort(np.random.PCG64(np.random.SeedSequence([n])).random_raw(n), kind="stable")[:count])


def batches(sizes: Iterable[int], tokens: int) -> list[list[int]]:
    """Group sequences of equal length into batches that go through the model together.

    Args:
        sizes: tokens of each sequence.
        tokens: largest number of tokens in a batch, unless one sequence has more.

    Returns:
        batches of sequence numbers, ascending in a batch, each number once. The batches of one length follow those of another, in the order in
        which the lengths first occur.
    """
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    found = []
    for size, group in groups.items():
        together = max(1, tokens // size)
        found += [group[start : start + together] for start in range(0, len(group), together)]
    return found
