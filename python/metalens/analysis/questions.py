"""Multiple-choice and cloze questions: their file, and demonstrations before them.

A file of questions is JSON Lines, one question in each line:

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    {"context": "The capital of France is", "answer": " Paris"}

The first is multiple choice: "answer" is the index of the right choice, or its text. The second is a cloze: the answer counts as right if
every token of it is the most likely one. The context and a choice are joined as they are, so a choice begins with its space. Other fields
are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from metalens.training.data.readers import JsonLines
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        context: text before the answer.
        choices: texts of the possible answers; of a cloze the right one alone.
        answer: index of the right choice.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def is_cloze(self) -> bool:
        """Return whether the answer competes with the whole vocabulary, not with other choices."""
        return len(self.choices) == 1


def read_questions(path: str | Path) -> list[Question]:
    """Read a file of questions (see the module), also through gzip if its name ends in .gz.

    Raises:
        InvalidValueError: for a line that is no question, with the number of the line; for a file without any; and for a file with
            multiple-choice and cloze questions.
        OSError: if the file can't be read.
    """
    found = [_question(record, where) for where, record in JsonLines(Path(path), "context").records()]
    if len({question.is_cloze for question in found}) > 1:
        raise InvalidValueError(f"{path} mixes multiple-choice and cloze questions, whose accuracies can't be averaged. Give one file for each kind.")
    return found


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise InvalidValueError(f"{where}: expected a JSON object with context and answer, got {type(record).__name__}.")
    context, choices, answer = (record.get(name) for name in ("context", "choices", "answer"))
    if not isinstance(context, str) or not context:
        raise InvalidValueError(f'{where}: "context" must be a text that is not empty, got {context!r:.80}.')
    if choices is None:
        if not isinstance(answer, str) or not answer:
            raise InvalidValueError(f'{where}: a question without "choices" needs "answer" as a text, got {answer!r:.80}.')
        return Question(context, (answer,), 0)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidValueError(f'{where}: "choices" must be two texts or more, none of them empty, got {choices!r:.80}.')
    if len(set(choices)) < len(choices):
        raise InvalidValueError(f'{where}: "choices" has a text twice: {choices!r:.80}. Every choice must differ from the others.')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InvalidValueError(f'{where}: "answer" must be the index of a choice, 0 to {len(choices) - 1}, or the text of one, got {answer!r:.80}.')
    return Question(context, tuple(choices), answer)


def with_demonstrations(
    questions: Sequence[Question], shots: int, *, false: bool = False, separator: str = "\n\n", seed: int = 0, limit: int | None = None
) -> list[Question]:
    """Put answered questions before each question, drawn at random from the others.

    The same seed draws the same questions with true and with false answers, so that the two differ in nothing else.

    Args:
        questions: the questions.
        shots: demonstrations before each question, 0 or more.
        false: answer every demonstration wrongly: with one of its wrong choices, drawn at random (Halawi et al. 2023); in a
            cloze task with the answer of another question that differs.
        separator: text after each demonstration.
        seed: seed of the draws.
        limit: ask only the first questions, this many; demonstrations come from all of them. None = ask all.

    Raises:
        InvalidValueError: if there are too few other questions, or no wrong answer to a cloze question.
    """
    if shots < 0 or shots >= max(len(questions), 1):
        raise InvalidValueError(f"{shots} demonstrations need more than {shots} questions; there are {len(questions)}. Give a larger file or fewer.")
    rng = np.random.default_rng(seed)
    asked = []
    for i, question in enumerate(questions[:limit]):
        others: list[int] = rng.choice(len(questions) - 1, size=shots, replace=False).tolist() if shots else []
        shown = [questions[j + (j >= i)] for j in others]
        draws = rng.random(shots)  # drawn also for true answers, which keeps the two in step
        answers = [_wrong_answer(other, questions, draw) if false else other.choices[other.answer] for other, draw in zip(shown, draws, strict=True)]
        before = "".join(other.context + answer + separator for other, answer in zip(shown, answers, strict=True))
        asked.append(replace(question, context=before + question.context))
    return asked


def _wrong_answer(question: Question, questions: Sequence[Question], draw: float) -> str:
    """Return a wrong answer; `draw` from 0 to 1 chooses it."""
    if question.is_cloze:
        wrong = sorted({other.choices[0] for other in questions} - {question.choices[0]})
    else:
        wrong = [choice for i, choice in enumerate(question.choices) if i != question.answer]
    if not wrong:
        raise InvalidValueError(f"All cloze questions have the answer {question.choices[0]!r:.80}: there is no false one.")
    return wrong[int(draw * len(wrong))]
