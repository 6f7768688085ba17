"""The jobs of the viewer: read texts, generate, follow tokens, compare. Each works part by part, and yields lines for the page.

A line is a JSON object with a `type`: 'progress' (`what`, `done`, `total`), 'part' (`text`, `lens`, `reading`, `trajectory`: the next positions of a
trajectory), 'chosen' (`text`, `lens`, `start`, `total`, `chosen`, `vocabulary`: the curves of followed tokens at the next positions), 'comparison'
(`start`, `comparison`: the next positions of one). The server adds 'done' and 'error'. `reading` names the texts: a request to follow tokens or to
compare returns it, so that it never means the texts of another tab.

The session keeps the texts alone, not what was read of them: its memory does not grow with their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from secrets import token_hex
from typing import Any

import numpy as np

from metalens.display.pages import lenses_compared
from metalens.display.server.requests import CompareRequest, FollowRequest, Limits, ReadRequest
from metalens.lenses.lens import Lens
from metalens.model import InterpretableModel
from metalens.readings import compare_in_parts, read_lenses_in_parts
from metalens.readings.chosen_tokens import token_ids_of
from metalens.readings.comparison import Comparison
from metalens.readings.export import divergences_json
from metalens.readings.generation import GenerationOptions
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import TrajectoryOptions
from metalens.utils.errors import InvalidValueError
from metalens.viewer.page import TextAndLens

Line = dict[str, Any]
PART = 128  # tokens: how many arrive at a time, and after how many a job can be stopped


class Session:
    """A model with its lenses, and the last texts.

    Args:
        model: the model.
        lenses: the lenses, the logit lens (None) first.
        limits: what a request may ask for.
        embedding: also read the embedding's output, as the first layer.
    """

    def __init__(self, model: InterpretableModel, lenses: list[Lens | None], limits: Limits, embedding: bool = False) -> None:
        self.model, self.lenses, self.limits, self.embedding = model, lenses, limits, embedding
        self.reading = ""  # name of the job that read the last texts: no other one has it, also none of an earlier server on this port
        self.texts: list[list[int]] = []

    def read(self, request: ReadRequest) -> Iterator[Line]:
        """Read texts through every lens, each text in one forward pass, and compare the lenses on the way."""
        token_ids_of(self.model, request.tokens)  # a token that does not exist is an error before anything is read
        self._begin([self._ids(text) for text in request.texts])
        total, done = sum(map(len, self.texts)), 0
        yield _progress("reading", done, total)
        options: TrajectoryOptions = {"top_k": self._top_k, "tokens": request.tokens, "embedding": self.embedding}
        for text, ids in enumerate(self.texts):
            for part in read_lenses_in_parts(self.model, ids, self.lenses, part_size=PART, compare_lenses=True, **options):
                yield from self._parts(text, part.trajectories, part.comparisons)
                done += len(part.trajectories[0])
                yield _progress("reading", done, total)

    def generate(self, request: ReadRequest) -> Iterator[Line]:
        """Continue a text token by token, read through every lens."""
        token_ids_of(self.model, request.tokens)
        ids = self._ids(request.texts[0], request.new_tokens)
        yield _progress("generating", 0, request.new_tokens)
        options: GenerationOptions = {
            "max_tokens": request.new_tokens,
            "top_k": self._top_k,
            "tokens": request.tokens,
            "embedding": self.embedding,
        }
        steps = self.model.generate_with_lenses(ids, self.lenses, compare_lenses=True, **options)  # refuses bad arguments before a text is replaced
        self._begin([[]])
        # The trajectory of a step ends with the token before the one that it chose: nothing has read the last one.
        for done, step in enumerate(steps, 1):
            self.texts[0] += step.trajectory.token_ids.tolist()
            yield from self._parts(0, step.trajectories, step.comparisons)
            yield _progress("generating", done, request.new_tokens)

    def follow(self, request: FollowRequest) -> Iterator[Line]:
        """Compute probability and rank of tokens in every cell of what the page shows (InvalidValueError if it shows other texts)."""
        self._require(request.reading, request.shown)
        token_ids_of(self.model, request.tokens)
        total, done = sum(len(self.texts[text]) for text in {text for text, _ in request.shown}), 0
        yield _progress("following", done, total)
        for text, shown in groupby(sorted(set(request.shown)), key=lambda pair: pair[0]):
            lenses = [lens for _, lens in shown]
            options: TrajectoryOptions = {"tokens": request.tokens, "top_k": 1, "compare": False, "embedding": self.embedding}
            for part in read_lenses_in_parts(self.model, self.texts[text], [self.lenses[lens] for lens in lenses], part_size=PART, **options):
                for lens, trajectory in zip(lenses, part.trajectories, strict=True):
                    yield self._chosen(text, lens, trajectory)
                done += len(part.trajectories[0])
                yield _progress("following", done, total)

    def compare(self, request: CompareRequest) -> Iterator[Line]:
        """Compare two texts through one lens, or, if `a` and `b` are the same, every layer with the next one.

        Raises:
            InvalidValueError: if the page shows other texts, or the texts have different lengths.
        """
        self._require(request.reading, [request.a, request.b])
        (text, lens), (other, other_lens) = request.a, request.b
        ids, others = self.texts[text], self.texts[other]
        if lens != other_lens:
            raise InvalidValueError("Lenses are compared while a text is read. Ask for one lens on two texts, or for one lens on one text.")
        if len(ids) != len(others):
            raise InvalidValueError(f"Texts are compared token by token: these have {len(ids)} and {len(others)}. Read texts of equal length.")
        start = 0
        yield _progress("comparing", start, len(ids))
        compared = None if text == other else others
        for part in compare_in_parts(self.model, ids, compared, self.lenses[lens], part_size=PART, embedding=self.embedding):
            yield _comparison(start, request.a, request.b, part)
            start += part["js"].shape[1]
            yield _progress("comparing", start, len(ids))

    # ------------------------------------------------------------------ parts of them

    def _begin(self, texts: list[list[int]]) -> None:
        self.reading, self.texts = token_hex(8), texts

    def _require(self, reading: str, shown: list[TextAndLens]) -> None:
        """Check that a request means the last texts, and lenses that are here (InvalidValueError if not)."""
        if not self.texts:
            raise InvalidValueError("No text has been read yet. Read one first.")
        if reading != self.reading:
            raise InvalidValueError("The server has read another text since, for example for another tab. Read this one again.")
        for text, lens in shown:
            if text >= len(self.texts) or lens >= len(self.lenses):
                raise InvalidValueError(f"There is no text {text} with a lens {lens}: the server has {len(self.texts)} and {len(self.lenses)}.")

    def _parts(self, text: int, trajectories: list[Trajectory], comparisons: list[Comparison]) -> Iterator[Line]:
        """Yield one part of a text through every lens, and of what the lenses differ in."""
        for lens, part in enumerate(trajectories):
            yield {"type": "part", "text": text, "lens": lens, "reading": self.reading, "trajectory": part.to_json(compact=True)}
        start = trajectories[0].first_position
        for (a, b), found in zip(lenses_compared(text, len(trajectories)), comparisons, strict=True):
            yield _comparison(start, a, b, found.to_numpy())

    def _chosen(self, text: int, lens: int, part: Trajectory) -> Line:
        found = part.to_json()
        where = {"text": text, "lens": lens, "start": part.first_position, "total": len(self.texts[text])}
        return {"type": "chosen", **where, "chosen": found["chosen"], "vocabulary": found["vocabulary"]}

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


def _comparison(start: int, a: TextAndLens, b: TextAndLens, values: Mapping[str, np.ndarray]) -> Line:
    return {"type": "comparison", "start": start, "comparison": {"of": [[*a], [*b]], "statistics": divergences_json(values, compact=True)}}


def _progress(what: str, done: int, total: int) -> Line:
    return {"type": "progress", "what": what, "done": done, "total": total}
