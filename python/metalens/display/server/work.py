"""The jobs of the viewer: read texts part by part, generate token by token, follow tokens. Each yields lines for the page.

A line is a JSON object with a `type`: 'progress' (`what`, `done`, `total`), 'part' (`text`, `lens`, `reading`, `trajectory`: the next positions of a
trajectory), 'chosen' (`text`, `lens`, `chosen`, `vocabulary`: the curves of followed tokens at all positions), 'comparison'. The server adds
'done' and 'error'. `reading` names the texts: a request to follow tokens returns it, so that it never means the texts of another tab.
"""

from __future__ import annotations

from collections.abc import Iterator
from secrets import token_hex
from typing import Any

from metalens.display.pages import comparable, comparison_of
from metalens.display.server.requests import FollowRequest, Limits, ReadRequest
from metalens.lenses.lens import Lens
from metalens.model import InterpretableModel
from metalens.readings import Trajectory, join_trajectories, read_trajectory, read_trajectory_parts
from metalens.readings.chosen_tokens import token_ids_of
from metalens.utils.errors import InvalidValueError

Line = dict[str, Any]
PART = 128  # tokens: how many arrive at a time, and after how many a job can be stopped


class Session:
    """A model with its lenses, and the last texts.

    Args:
        model: the model.
        lenses: the lenses, the logit lens (None) first.
        limits: what a request may ask for.
    """

    def __init__(self, model: InterpretableModel, lenses: list[Lens | None], limits: Limits) -> None:
        self.model, self.lenses, self.limits = model, lenses, limits
        self.reading = ""  # name of the job that read the last texts: no other one has it, also none of an earlier server on this port
        self.texts: list[list[int]] = []
        self.joined: dict[tuple[int, int], Trajectory] = {}  # {(text, lens): what was read of it}

    def read(self, request: ReadRequest) -> Iterator[Line]:
        """Read texts through every lens, and compare what can be compared."""
        token_ids_of(self.model, request.tokens)  # a token that does not exist is an error before anything is read
        self._begin([self._ids(text) for text in request.texts])
        total = sum(map(len, self.texts)) * len(self.lenses)
        done = 0
        yield _progress("reading", done, total)
        for text in range(len(self.texts)):
            for lens in range(len(self.lenses)):
                for part in self._parts(text, lens, request.tokens):
                    yield self._part(text, lens, part)
                    done += len(part)
                    yield _progress("reading", done, total)
        yield from self._comparisons()

    def generate(self, request: ReadRequest) -> Iterator[Line]:
        """Continue a text token by token, read through the last lens; then read the whole through the other one."""
        token_ids_of(self.model, request.tokens)
        ids = self._ids(request.texts[0], request.new_tokens)
        lens = len(self.lenses) - 1
        yield _progress("generating", 0, request.new_tokens)
        steps = self.model.generate_with_lens(ids, self.lenses[lens], max_tokens=request.new_tokens, top_k=self._top_k, tokens=request.tokens)
        # The trajectory of a step ends with the token before the one that it chose: nothing has read the last one.
        self._begin([[]])
        for done, step in enumerate(steps, 1):
            self.texts[0] += step.trajectory.token_ids.tolist()
            yield self._part(0, lens, step.trajectory)
            yield _progress("generating", done, request.new_tokens)
        for other in range(lens):
            for part in self._parts(0, other, request.tokens):
                yield self._part(0, other, part)
        yield from self._comparisons()

    def follow(self, request: FollowRequest) -> Iterator[Line]:
        """Compute probability and rank of tokens in every cell of the last texts (InvalidValueError if the request means other ones)."""
        if not self.texts:
            raise InvalidValueError("No text has been read yet. Read one first.")
        if request.reading != self.reading:
            raise InvalidValueError("The server has read another text since, for example for another tab. Read this one again.")
        token_ids_of(self.model, request.tokens)
        count = len(self.texts) * len(self.lenses)
        for done, (text, lens) in enumerate((text, lens) for text in range(len(self.texts)) for lens in range(len(self.lenses))):
            yield _progress("following", done, count)
            found = self._whole(text, lens).follow(request.tokens).to_json()
            yield {"type": "chosen", "text": text, "lens": lens, "chosen": found["chosen"], "vocabulary": found["vocabulary"]}

    # ------------------------------------------------------------------ parts of them

    def _begin(self, texts: list[list[int]]) -> None:
        self.reading, self.texts, self.joined = token_hex(8), texts, {}

    def _part(self, text: int, lens: int, part: Trajectory) -> Line:
        return {"type": "part", "text": text, "lens": lens, "reading": self.reading, "trajectory": part.to_json(compact=True)}

    @property
    def _top_k(self) -> int:
        return min(self.limits.top_k, self.model.unembed.head.tokens)

    def _ids(self, text: str, more: int = 0) -> list[int]:
        """Return the token ids of a text that is going to have `more` of them (InvalidValueError if these are too many)."""
        ids = self.model.encode(text)
        if len(ids) + more > self.limits.max_tokens:
            new = f" and {more:,} new ones" if more else ""
            raise InvalidValueError(
                f"The text has {len(ids):,} tokens{new}; this server reads at most {self.limits.max_tokens:,}. "
                "Shorten it, or start `metalens view` with a larger --max-tokens."
            )
        return ids

    def _parts(self, text: int, lens: int, tokens: list[str | int]) -> Iterator[Trajectory]:
        """Yield the parts of a trajectory, and keep what they are together."""
        parts = []
        for part in read_trajectory_parts(self.model, self.texts[text], self.lenses[lens], part_size=PART, top_k=self._top_k, tokens=tokens):
            parts.append(part)
            yield part
        self.joined[text, lens] = join_trajectories(parts)

    def _whole(self, text: int, lens: int) -> Trajectory:
        known = self.joined.get((text, lens))
        return known or read_trajectory(self.model, self.texts[text], self.lenses[lens], top_k=1, compare=False)

    def _comparisons(self) -> Iterator[Line]:
        """Yield how far two lenses are apart on each text, and two texts of one length through each lens."""
        pairs = comparable([[len(ids)] * len(self.lenses) for ids in self.texts])
        for done, (a, b) in enumerate(pairs):
            yield _progress("comparing", done, len(pairs))
            yield {"type": "comparison", "comparison": comparison_of(self._whole(*a), self._whole(*b), a, b)}


def _progress(what: str, done: int, total: int) -> Line:
    return {"type": "progress", "what": what, "done": done, "total": total}
