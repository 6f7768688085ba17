"""Score the answers of questions through every layer: the log-probability of each choice, as lm-evaluation-harness computes it for a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from metalens.analysis.questions import Question
from metalens.lenses.lens import Lens, as_lens, lens_kind
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.ops import lens_stats
from metalens.readings.rows import require_finite, select_layers
from metalens.readings.source import RowSource, parts_of
from metalens.readings.statistics import settled_from
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar

# What the log-probability of a choice is divided by.
Normalize = Literal["none", "tokens", "characters"]


class Continuation(NamedTuple):
    """A text after a context, as token ids.

    Attributes:
        context: ids of the context, one at least.
        ids: ids of the continuation, one at least.
    """

    context: tuple[int, ...]
    ids: tuple[int, ...]


class ContinuationScore(NamedTuple):
    """What each of R layers, and then the model itself, says of a continuation.

    Attributes:
        log_prob: [R + 1] log-probability of the continuation given its context, in nats.
        greedy: [R + 1] whether each of its tokens is the most likely one.
    """

    log_prob: np.ndarray
    greedy: np.ndarray


def continuation_of(model: LanguageModel, context: str, text: str) -> Continuation:
    """Return a context and its continuation as ids, by the convention of lm-evaluation-harness.

    Spaces at the end of the context belong to the continuation. Both are encoded together, and cut after as many tokens as the context
    alone has.

    Raises:
        InvalidValueError: if the context has no token (an empty text, and a tokenizer that puts none before it), or the continuation adds none.
    """
    stripped = context.rstrip()
    context, text = stripped, context[len(stripped) :] + text
    before = len(model.encode(context))
    ids = model.encode(context + text)
    if before == 0 or len(ids) <= before:
        raise InvalidValueError(
            f"{context!r:.40} and {text!r:.40} make {len(ids)} tokens, of which {before} are context. Each part needs at least one token of its own."
        )
    return Continuation(tuple(ids[:before]), tuple(ids[before:]))


def score_continuations(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    lens: Lens | str | Path | None = None,
    layers: Sequence[int] | None = None,
) -> list[ContinuationScore]:
    """Score continuations through a lens, at every layer, and by the model itself.

    Continuations that differ in their last token alone, such as the one-token choices of a question, take one forward pass and one row of
    the unembedding for each layer together.

    Args:
        model: the model.
        continuations: the continuations.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None = the logit lens.
        layers: layer numbers, negative from the end; None = all.

    Returns:
        one score for each continuation.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an unknown layer, ids outside the vocabulary, a lens of another model, or NaN in the logits.
    """
    lens = as_lens(lens)
    check_lens(lens, model)
    blocks = tuple(select_layers(layers, model.num_layers))
    groups: dict[Continuation, list[int]] = {}
    for i, each in enumerate(continuations):
        groups.setdefault(Continuation(each.context, each.ids[:-1]), []).append(i)
    found: list[ContinuationScore | None] = [None] * len(continuations)
    for shared, members in groups.items():
        read = model.check_ids(np.array([shared.context + shared.ids]))
        where = range(len(shared.context) - 1, read.shape[1])
        source = RowSource(model, read, lens, model.unembed.norm, blocks, where)
        labels = model.check_ids(np.array([continuations[i].ids for i in members]).T)
        log_prob, greedy = _scores(source, labels)
        for column, i in enumerate(members):
            found[i] = ContinuationScore(log_prob[:, column], greedy[:, column])
    return [score for score in found if score is not None]


def _scores(source: RowSource, labels: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed log-probability [R + 1, C] of C columns of labels [T, C], and whether each label is on top [R + 1, C]."""
    log_prob: np.ndarray | float = 0.0
    greedy: np.ndarray | bool = True
    start = 0
    for (rows,), own in parts_of([source]):
        here = labels[start : start + own.shape[0]]
        start += own.shape[0]
        # One label for each token is what every backend has a kernel for.
        stats = lens_stats(mx.concatenate([rows, own[None]]), source.head, labels=here[:, 0] if here.shape[1] == 1 else here)
        require_finite(stats)
        nll = np.array(stats.nll, np.float64).reshape(*stats.lse.shape, -1)
        log_prob = log_prob - nll.sum(axis=1)
        greedy = greedy & (np.array(stats.top_ids) == np.array(here)).all(axis=1)
    return np.asarray(log_prob), np.asarray(greedy)


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """What R layers and the model say of the choices of N questions. The last row of each array is the model's own.

    Attributes:
        layers: the R layers.
        lens: name of the lens.
        log_probs: [R + 1, N, C] log-probability of each choice, in nats. NaN where a question has fewer choices than C.
        greedy: [R + 1, N, C] whether every token of the choice is the most likely one.
        tokens, characters: [N, C] length of each choice; 0 where there is none.
        answers: [N] index of the right choice.
    """

    layers: tuple[int, ...]
    lens: str
    log_probs: np.ndarray
    greedy: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    answers: np.ndarray

    @property
    def is_cloze(self) -> bool:
        """Return whether the answers compete with the whole vocabulary."""
        return bool(self.log_probs.shape[2] == 1)

    def probabilities(self, normalize: Normalize = "none") -> np.ndarray:
        """Return the softmax over the choices of their log-probabilities, [R + 1, N, C]; 0 where there is no choice.

        Args:
            normalize: 'none'; 'tokens' or 'characters' divides each log-probability by the length of the choice first. The harness calls
                the accuracy by characters acc_norm.

        Raises:
            InvalidValueError: for another word.
        """
        if normalize not in ("none", "tokens", "characters"):
            raise InvalidValueError(f"normalize must be 'none', 'tokens' or 'characters', got {normalize!r:.40}.")
        lengths = np.ones_like(self.tokens) if normalize == "none" else getattr(self, normalize)
        scores = np.where(self.tokens > 0, self.log_probs / np.maximum(lengths, 1), -np.inf)
        odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found: np.ndarray = odds / odds.sum(axis=-1, keepdims=True)
        return found

    def predictions(self, normalize: Normalize = "none") -> np.ndarray:
        """Return the index of the most likely choice, [R + 1, N].

        Raises:
            InvalidValueError: for cloze questions, which have one choice.
        """
        if self.is_cloze:
            raise InvalidValueError("A cloze question has no choices to predict: give questions with choices.")
        found: np.ndarray = self.probabilities(normalize).argmax(axis=-1)
        return found

    def correct(self, normalize: Normalize = "none") -> np.ndarray:
        """Return whether each question is answered rightly, [R + 1, N]: the right choice is the most likely, or the cloze is greedily completed."""
        found: np.ndarray = self.greedy[..., 0] if self.is_cloze else self.predictions(normalize) == self.answers
        return found

    def prediction_depth(self, normalize: Normalize = "none") -> np.ndarray:
        """Return for each question [N] the first row from which on every layer predicts the model's choice; R if the last row's is another.

        Raises:
            InvalidValueError: for cloze questions.
        """
        predicted = self.predictions(normalize)
        return settled_from(predicted[:-1] == predicted[-1])

    def features(self) -> np.ndarray:
        """Return the trajectories of the choices as rows [N, R + 1, C] for detectors; with two choices their log-odds [N, R + 1, 1].

        These are the features of the paper's experiment on prompt injection.

        Raises:
            InvalidValueError: if the questions have different numbers of choices.
        """
        if (self.tokens == 0).any():
            raise InvalidValueError("The questions have different numbers of choices, so their trajectories have different lengths.")
        by_question = np.moveaxis(self.log_probs, 1, 0)
        return by_question[..., 1:] - by_question[..., :1] if by_question.shape[2] == 2 else by_question


def score_choices(
    model: LanguageModel,
    questions: Sequence[Question],
    lens: Lens | str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    show_progress: bool = False,
) -> ChoiceScores:
    """Score every choice of every question through a lens, at every layer, and by the model itself.

    Args:
        model: the model, with a tokenizer.
        questions: the questions, one at least.
        lens, layers: as in `score_continuations`.
        show_progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError, InvalidValueError: as `score_continuations`; also for no question, and a context or a choice without a token.
    """
    if not questions:
        raise InvalidValueError("There is no question to score.")
    lens = as_lens(lens)
    blocks = tuple(select_layers(layers, model.num_layers))
    shape = (len(questions), max(len(question.choices) for question in questions))
    log_probs = np.full((len(blocks) + 1, *shape), np.nan)
    greedy = np.zeros(log_probs.shape, bool)
    tokens, characters = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, pairs in enumerate(_tokenized(model, questions, show_progress)):
        for j, score in enumerate(score_continuations(model, pairs, lens, blocks)):
            log_probs[:, i, j], greedy[:, i, j] = score
            tokens[i, j], characters[i, j] = len(pairs[j].ids), len(questions[i].choices[j])
    answers = np.array([question.answer for question in questions])
    return ChoiceScores(blocks, lens_kind(lens), log_probs, greedy, tokens, characters, answers)


def _tokenized(model: LanguageModel, questions: Sequence[Question], show_progress: bool) -> Iterator[list[Continuation]]:
    """Yield the continuations of one question after another, and count their tokens on a bar."""
    tokenized = [[continuation_of(model, question.context, choice) for choice in question.choices] for question in questions]
    total = sum(len(each.context) + len(each.ids) for pairs in tokenized for each in pairs)
    with token_bar(total, "scoring", show_progress) as bar:
        for pairs in tokenized:
            yield pairs
            bar.update(sum(len(each.context) + len(each.ids) for each in pairs))
