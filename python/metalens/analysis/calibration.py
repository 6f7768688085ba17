"""Calibration of predictions: expected calibration error, and accuracy at thresholds that undo a bias toward some answers."""

from __future__ import annotations

import numpy as np

from metalens.utils.errors import InvalidValueError


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int | None = None, *, norm: int = 1) -> float:
    """Return the expected calibration error: the mean difference of confidence and accuracy over bins with equally many predictions.

    With bins=None it is the monotonic sweep of Roelofs et al. (2020), which tuned-lens v0.0.3 has: the largest number of bins whose
    accuracies still rise from bin to bin, and none of which is all right or all wrong.

    Args:
        confidence: [N] probability of the predicted answer, 0 to 1.
        correct: [N] whether the prediction is right.
        bins: number of bins, 1 to N. None = sweep.
        norm: power p of the mean (sum of w |accuracy - confidence|^p)^(1/p). tuned-lens takes 2.

    Returns:
        the error, 0 to 1.

    Raises:
        InvalidValueError: for no predictions, arrays of two lengths, or bins or norm out of range.
    """
    if len(confidence) == 0 or len(confidence) != len(correct):
        raise InvalidValueError(f"A calibration error needs one confidence for each prediction, got {len(confidence)} and {len(correct)}.")
    if norm < 1 or (bins is not None and not 1 <= bins <= len(confidence)):
        raise InvalidValueError(f"bins must be from 1 to the {len(confidence)} predictions and norm at least 1, got {bins} and {norm}.")
    order = np.argsort(confidence, kind="stable")
    sure, right = np.asarray(confidence, np.float64)[order], np.asarray(correct, np.float64)[order]
    count = _monotonic_bins(right) if bins is None else bins
    pairs = zip(np.array_split(sure, count), np.array_split(right, count), strict=True)
    total = sum(len(s) / len(sure) * abs(r.mean() - s.mean()) ** norm for s, r in pairs)
    return float(total ** (1 / norm))


def _monotonic_bins(right: np.ndarray) -> int:
    """Return the largest number of bins up to which accuracies rise strictly, and lie strictly between 0 and 1."""
    for count in range(2, len(right) + 1):
        accuracies = np.array([part.mean() for part in np.array_split(right, count)])
        if not ((np.diff(accuracies) > 0).all() and (accuracies * (1 - accuracies) > 0).all()):
            return count - 1
    return len(right)


def calibrated_accuracy(probabilities: np.ndarray, answers: np.ndarray) -> float:
    """Return the accuracy at thresholds for each answer, which undoes a bias of the model toward some of them (Halawi et al. 2023).

    A prediction counts as right if the probability of its right answer lies above a quantile of this answer's probabilities over all
    questions: the quantile 1 - 1/C of C answers. With two answers, as in the paper's experiments, the threshold of answer 1 is the
    quantile at which as many questions get it as have it. A probability that equals its threshold counts 1/C.

    The answers must mean the same in every question, as the labels of a classification do.

    Args:
        probabilities: [N, C] probabilities of the answers of N questions.
        answers: [N] indices of the right answers.

    Raises:
        InvalidValueError: if the shapes do not fit, or there is no question.
    """
    p, answers = np.asarray(probabilities, np.float64), np.asarray(answers)
    if p.ndim != 2 or len(p) == 0 or p.shape[1] < 2 or answers.shape != p.shape[:1]:
        raise InvalidValueError(f"calibrated_accuracy needs probabilities [N, C] with C >= 2 and answers [N], got {p.shape} and {answers.shape}.")
    choices = p.shape[1]
    if choices == 2:
        threshold = np.quantile(p[:, 1], 1 - np.mean(answers == 1))
        margin = np.where(answers == 1, p[:, 1] - threshold, threshold - p[:, 1])
    else:
        margin = p[np.arange(len(p)), answers] - np.quantile(p, 1 - 1 / choices, axis=0)[answers]
    return float(np.mean((margin > 0) + (margin == 0) / choices))
