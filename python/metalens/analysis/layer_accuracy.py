"""Accuracy and calibration of every layer on questions, and how false demonstrations change them: overthinking (the paper's Fig. 11).

Halawi et al. (2023) found that a model that sees false demonstrations answers better at a middle layer than at its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalens.analysis.calibration import calibrated_accuracy, calibration_error
from metalens.analysis.choices import ChoiceScores, Normalize, score_choices
from metalens.analysis.questions import Question, with_demonstrations
from metalens.analysis.resampling import Interval, bootstrap_mean
from metalens.lenses.lens import Lens
from metalens.models.language_model import LanguageModel


@dataclass(frozen=True)
class LayerAccuracy:
    """How well one layer, or the model itself, answers questions.

    Attributes:
        layer: number of the block. None = the model itself.
        accuracy: fraction of right answers, with its interval over the questions.
        calibrated_accuracy: accuracy at thresholds that undo a bias toward some answers; None for cloze questions, and where questions have
            different numbers of choices.
        calibration_error: expected difference of confidence and accuracy; None for cloze questions.
        right_probability: mean probability of the right answer among the choices; None for cloze questions.
    """

    layer: int | None
    accuracy: Interval
    calibrated_accuracy: float | None
    calibration_error: float | None
    right_probability: float | None


def accuracy_by_layer(scores: ChoiceScores, normalize: Normalize = "none", *, bins: int | None = None, seed: int = 0) -> list[LayerAccuracy]:
    """Return the accuracy and calibration of every layer, and last of the model itself.

    Args:
        scores: scores of the questions.
        normalize: what the log-probability of a choice is divided by.
        bins: bins of the calibration error; None = the monotonic sweep of `calibration_error`.
        seed: seed of the bootstrap.
    """
    correct = scores.correct(normalize)
    found = []
    for row, layer in enumerate([*scores.layers, None]):
        accuracy = bootstrap_mean(correct[row], seed=seed)
        if scores.is_cloze:
            found.append(LayerAccuracy(layer, accuracy, None, None, None))
            continue
        p = scores.probabilities(normalize)[row]
        calibrated = calibrated_accuracy(p, scores.answers) if (scores.tokens > 0).all() else None
        error = calibration_error(p.max(axis=-1), correct[row], bins)
        right = float(p[np.arange(len(p)), scores.answers].mean())
        found.append(LayerAccuracy(layer, accuracy, calibrated, error, right))
    return found


@dataclass(frozen=True, eq=False)
class Overthinking:
    """Scores of the same questions after true and after false demonstrations.

    Attributes:
        shots: demonstrations before each question.
        true, false: the scores.
    """

    shots: int
    true: ChoiceScores
    false: ChoiceScores

    def gap(self, normalize: Normalize = "none", *, seed: int = 0) -> list[Interval]:
        """Return for each layer, and last for the model itself, by how much false demonstrations lower the accuracy.

        The interval is over questions; both scores of a question stay together.
        """
        difference = self.true.correct(normalize).astype(np.float64) - self.false.correct(normalize)
        return [bootstrap_mean(row, seed=seed) for row in difference]

    def best_layer(self, normalize: Normalize = "none", *, seed: int = 0) -> tuple[int, Interval]:
        """Return the layer that answers best after false demonstrations, and by how much it is better than the model itself.

        The layer is chosen on the same questions, so the difference is biased upward; with many questions the bias is small.
        """
        correct = self.false.correct(normalize).astype(np.float64)
        best = int(correct[:-1].mean(axis=1).argmax())
        return self.false.layers[best], bootstrap_mean(correct[best] - correct[-1], seed=seed)


def overthinking(
    model: LanguageModel,
    questions: Sequence[Question],
    lens: Lens | str | Path | None = None,
    *,
    shots: int = 10,
    layers: Sequence[int] | None = None,
    separator: str = "\n\n",
    limit: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Overthinking:
    r"""Score questions after true and after false demonstrations, through every layer.

    Args:
        model: the model, with a tokenizer.
        questions: the questions, more than `shots`.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None = the logit lens.
        shots: demonstrations before each question.
        layers: layer numbers, negative from the end; None = all.
        separator: text after each demonstration.
        limit: ask only the first questions, this many; demonstrations come from all. None = ask all.
        seed: seed of the demonstrations.
        show_progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError, InvalidValueError: as `score_choices` and `with_demonstrations`.
    """
    scores = [
        score_choices(
            model,
            with_demonstrations(questions, shots, false=false, separator=separator, seed=seed, limit=limit),
            lens,
            layers=layers,
            show_progress=show_progress,
        )
        for false in (False, True)
    ]
    return Overthinking(shots, *scores)
