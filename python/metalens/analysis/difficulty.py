"""Difficulty of examples: how deep in the model a prediction settles, and how late in its training (the paper's Table 2).

Prediction depth is the number of layers after which the most likely answer no longer changes (Baldock et al. 2021, with a lens in place
of their nearest neighbors). The iteration learned is the earliest step of the training from which on the prediction is the final one
(Toneva et al. 2018; Baldock et al. 2021). An example that is learned late should be settled deep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalens.analysis.choices import Normalize, score_choices
from metalens.analysis.questions import Question
from metalens.analysis.resampling import Interval, bootstrap, spearman
from metalens.lenses.lens import Lens
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.readings.statistics import settled_from
from metalens.readings.trajectory_reader import read_trajectory
from metalens.utils.errors import InvalidValueError

# Predictions of N examples by one model: int [N].
PredictionSource = Callable[[LanguageModel], np.ndarray]


def iteration_learned(predictions: np.ndarray, steps: Sequence[int] | None = None) -> np.ndarray:
    """Return for each example the step of the training from which on its prediction equals the final one.

    Args:
        predictions: [S, N] predictions of N examples at S steps, the last row by the trained model.
        steps: S steps in rising order; None = 0, 1, 2, ...

    Returns:
        [N] steps. An example that is predicted as at the end from the first row on has the first step.

    Raises:
        InvalidValueError: if there is no prediction, or the steps do not fit.
    """
    predictions = np.asarray(predictions)
    if predictions.ndim != 2 or predictions.size == 0:
        raise InvalidValueError(f"iteration_learned needs predictions [S, N] of one step and one example at least, got {predictions.shape}.")
    names = np.arange(len(predictions)) if steps is None else np.asarray(steps)
    if names.shape != predictions.shape[:1] or (np.diff(names) <= 0).any():
        raise InvalidValueError(f"There must be one step for each of the {len(predictions)} rows, in rising order; got {list(names)}.")
    found: np.ndarray = names[settled_from(predictions == predictions[-1])]
    return found


def checkpoint_predictions(checkpoints: Iterable[LanguageModel | str | Path], predict: PredictionSource) -> np.ndarray:
    """Return what each checkpoint of a model predicts, [S, N]. One checkpoint is in memory at a time.

    Args:
        checkpoints: models, or names as `metalens.load` takes them, in the order of the training.
        predict: function of a model that returns its predictions [N]: `text_predictions` or `question_predictions`, or one of your own.

    Raises:
        InvalidValueError: if there is no checkpoint, or they predict different numbers of examples.
    """
    rows = []
    for checkpoint in checkpoints:
        model = checkpoint if isinstance(checkpoint, LanguageModel) else LanguageModel(checkpoint)
        rows.append(np.asarray(predict(model)))
        del model, checkpoint
    if not rows or len({row.shape for row in rows}) > 1:
        raise InvalidValueError(f"Checkpoints must predict the same examples; got predictions of the shapes {[row.shape for row in rows]}.")
    return np.stack(rows)


def text_predictions(texts: Sequence[TokenInput]) -> PredictionSource:
    """Return a function of a model that predicts the token after every position of some texts.

    Args:
        texts: token ids of each text. The same ids go to every model, so all must share one vocabulary.
    """

    def predict(model: LanguageModel) -> np.ndarray:
        last = [model.num_layers - 1]  # the model's own prediction is read beside it
        found = [read_trajectory(model, ids, layers=last, top_k=1, compare=False).model.top_ids[0, :, 0] for ids in texts]
        return np.concatenate(found)

    return predict


def question_predictions(questions: Sequence[Question], normalize: Normalize = "none") -> PredictionSource:
    """Return a function of a model that predicts the choice of every question.

    Args:
        questions: multiple-choice questions.
        normalize: what the log-probability of a choice is divided by.
    """

    def predict(model: LanguageModel) -> np.ndarray:
        found: np.ndarray = score_choices(model, questions, layers=[model.num_layers - 1]).predictions(normalize)[-1]
        return found

    return predict


@dataclass(frozen=True, eq=False)
class Difficulty:
    """Two measures of the difficulty of N examples.

    Attributes:
        depth: [N] prediction depth: first layer's row from which on the lens predicts what the model does.
        learned: [N] iteration learned.
        groups: [N] number of the text or question that each example belongs to.
    """

    depth: np.ndarray
    learned: np.ndarray
    groups: np.ndarray

    def correlation(self, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
        """Return Spearman's correlation of depth and iteration learned. NaN if one of them is the same for all examples.

        The interval is over texts or questions, whose examples stay together: the positions of one text are not independent.

        Args:
            resamples, level, seed: as in `metalens.analysis.bootstrap`.
        """
        members = [np.flatnonzero(self.groups == group) for group in np.unique(self.groups)]

        def of(chosen: np.ndarray) -> float:
            examples = np.concatenate([members[i] for i in chosen])
            return spearman(self.depth[examples], self.learned[examples])

        return bootstrap(of, len(members), resamples=resamples, level=level, seed=seed)


def text_depths(
    model: LanguageModel, texts: Sequence[TokenInput], lens: Lens | str | Path | None = None, layers: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the prediction depth at every position of some texts [N], and the number of the text of each [N].

    Args:
        model: the model.
        texts: the texts, or their token ids.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None = the logit lens.
        layers: layer numbers, negative from the end; None = all. A depth counts these layers.

    Raises:
        FileNotFoundError, InvalidValueError: as `metalens.readings.read_trajectory`.
    """
    depths = [read_trajectory(model, ids, lens, layers=layers, top_k=1, compare=False).prediction_depth for ids in texts]
    return np.concatenate(depths), np.repeat(np.arange(len(depths)), [len(depth) for depth in depths])
