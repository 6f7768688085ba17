"""Detect unusual prompts by their trajectories: features, detectors that see normal prompts alone, and their AUROC (the paper's Table 1).

The detectors are scikit-learn's, with its own settings. It is an optional package: pip install 'metalens[analysis]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from metalens.analysis.resampling import Interval
from metalens.analysis.roc import bootstrap_auroc
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.readings.statistics import STATISTICS
from metalens.readings.trajectory import Trajectory
from metalens.training.data.readers import JsonLines, text_of
from metalens.utils.errors import InvalidValueError, MissingPackageError

# {name: what the detector is}
DETECTORS = {
    "isolation-forest": "random trees isolate an anomaly near their root (Liu et al. 2008)",
    "local-outlier-factor": "the neighbors of an anomaly lie in a denser region than it does (Breunig et al. 2000)",
    "mahalanobis": "distance from a Gaussian of the normal prompts, with a shrunk covariance (Ledoit and Wolf 2004)",
    "relative-mahalanobis": "the same less the distance by the variances alone (Bai et al. 2022), the paper's baseline on hidden states",
}
RIDGE = 1e-3  # added to the variances of 'relative-mahalanobis', as the paper's experiment does


class Detector(Protocol):
    """A fitted detector."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return how unusual each row of features [N, F] is, [N]: larger = more unusual."""


# ------------------------------------------------------------------ features


def trajectory_features(
    trajectories: Sequence[Trajectory], statistics: Sequence[str] = ("entropy", "max_probability"), position: int = -1
) -> np.ndarray:
    """Return statistics of every layer at one position of some texts, as rows for a detector.

    The log-probabilities of chosen tokens are features too, if the trajectories have any (`tokens=`).

    Args:
        trajectories: one for each text, of the same layers and chosen tokens.
        statistics: names in `metalens.readings.STATISTICS` that every trajectory has at this position.
        position: position in each text, negative from its end.

    Returns:
        [N, R, k] for N texts, R layers and k statistics and chosen tokens.

    Raises:
        InvalidValueError: for no trajectory, an unknown statistic, one that was not computed or is not a number there, or trajectories of
            different layers or chosen tokens.
    """
    if not trajectories:
        raise InvalidValueError("There is no trajectory to take features from.")
    rows = []
    for each in trajectories:
        if (each.layers, each.chosen_ids) != (trajectories[0].layers, trajectories[0].chosen_ids):
            raise InvalidValueError("Trajectories must have the same layers and chosen tokens. Read all texts with the same arguments.")
        available = each.statistics()
        if missing := [name for name in statistics if name not in available]:
            raise InvalidValueError(f"The trajectory has no statistic {missing[0]!r:.80}; it has {', '.join(available)}, of {', '.join(STATISTICS)}.")
        column = each.column(position)
        values = [available[name][:, column] for name in statistics] + list(each.chosen_log_probs[:, :, column])
        rows.append(np.stack(values, axis=-1))
    found = np.stack(rows).astype(np.float64)
    if not np.isfinite(found).all():
        raise InvalidValueError(
            "A statistic is not a number at this position: the last position has no next token, so no cross-entropy and no rank. Choose others."
        )
    return found


def hidden_features(model: LanguageModel, texts: Sequence[TokenInput], layer: int | None = None, position: int = -1) -> np.ndarray:
    """Return the hidden state at one position of some texts, [N, D]: the features of the paper's baseline.

    Args:
        model: the model.
        texts: the texts.
        layer: number of the block, negative from the end; None = the middle one.
        position: position in each text, negative from its end.

    Raises:
        InvalidValueError: for an unknown layer, no text, or a text that is too short.
    """
    block = model.num_layers // 2 if layer is None else layer
    if not -model.num_layers <= block < model.num_layers or not texts:
        raise InvalidValueError(f"Hidden states need a text and a layer from 0 to {model.num_layers - 1}, got {len(texts)} texts and layer {layer}.")
    rows = []
    for text in texts:
        hidden = model.source.capture(model.ids(text)[:1]).hidden[block][0]
        if not -len(hidden) <= position < len(hidden):
            raise InvalidValueError(f"A text of {len(hidden)} tokens has no position {position}.")
        rows.append(np.array(hidden[position].astype(mx.float32)))
    return np.stack(rows).astype(np.float64)


# ------------------------------------------------------------------ detectors


def fit_detector(features: np.ndarray, method: str = "local-outlier-factor", *, seed: int = 0) -> Detector:
    """Fit a detector to normal examples.

    Args:
        features: [N, ...] features of N normal examples, N >= 2. Each is flattened.
        method: name in `DETECTORS`.
        seed: seed of the isolation forest.

    Raises:
        InvalidValueError: for an unknown method, too few examples, or features that are not finite.
        MissingPackageError: if scikit-learn is not installed.
    """
    if method not in DETECTORS:
        raise InvalidValueError(f"There is no detector {method!r:.80}; there are {', '.join(DETECTORS)}.")
    rows = _rows(features)
    if len(rows) < 2:
        raise InvalidValueError(f"A detector is fitted to two normal examples at least, got {len(rows)}.")
    return _RelativeMahalanobis(rows) if method == "relative-mahalanobis" else _Estimator(rows, method, seed)


def _rows(features: np.ndarray) -> np.ndarray:
    array = np.asarray(features, np.float64)
    if array.ndim < 2 or not array.size or not np.isfinite(array).all():
        raise InvalidValueError(f"Features must be finite numbers [N, ...], got an array {array.shape}.")
    return array.reshape(len(array), -1)


class _Estimator:
    """A detector of scikit-learn."""

    def __init__(self, rows: np.ndarray, method: str, seed: int) -> None:
        try:
            from sklearn.covariance import LedoitWolf
            from sklearn.ensemble import IsolationForest
            from sklearn.neighbors import LocalOutlierFactor
        except ImportError as error:
            raise MissingPackageError("Detectors of anomalies need scikit-learn: pip install 'metalens[analysis]'.") from error
        self.scale = np.ones(rows.shape[1])
        if method == "mahalanobis":  # a covariance is shrunk toward a multiple of the identity, which suits features of one size
            spread = rows.std(axis=0)
            self.scale = np.where(spread > 0, spread, 1.0)
        self.model: Any = {
            "isolation-forest": lambda: IsolationForest(random_state=seed),
            "local-outlier-factor": lambda: LocalOutlierFactor(n_neighbors=min(20, len(rows) - 1), novelty=True),  # 20: scikit-learn's own
            "mahalanobis": LedoitWolf,
        }[method]()
        self.distance = method == "mahalanobis"
        self.model.fit(rows / self.scale)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return how unusual each row is."""
        rows = _rows(features) / self.scale
        found: np.ndarray = self.model.mahalanobis(rows) if self.distance else -self.model.score_samples(rows)
        return found


class _RelativeMahalanobis:
    """The simplified relative Mahalanobis distance: (x - m)^T (C^-1 - diag(C)^-1) (x - m)."""

    def __init__(self, rows: np.ndarray) -> None:
        self.mean = rows.mean(axis=0)
        covariance = np.atleast_2d(np.cov(rows.T)) + RIDGE * np.eye(rows.shape[1])
        self.difference = np.linalg.inv(covariance) - np.diag(1 / np.diag(covariance))

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return how unusual each row is."""
        x = _rows(features) - self.mean
        found: np.ndarray = np.einsum("ni,ij,nj->n", x, self.difference, x)
        return found


# ------------------------------------------------------------------ the experiment


@dataclass(frozen=True, eq=False)
class Detection:
    """How well a detector tells anomalous examples from normal ones that it has not seen.

    Attributes:
        method: name of the detector.
        auroc: area under the ROC curve, with its bootstrap interval over the examples: 1 = told apart, 0.5 = not at all.
        fitted: number of normal examples that the detector was fitted to.
        normal, anomalous: scores of the normal examples that were held out [N], and of the anomalous ones [M].
    """

    method: str
    auroc: Interval
    fitted: int
    normal: np.ndarray
    anomalous: np.ndarray

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ROC curve: false and true positive rates, from (0, 0) to (1, 1), one point for each threshold."""
        thresholds = np.unique(np.concatenate([self.normal, self.anomalous]))[::-1, None]
        false, true = ((scores >= thresholds).mean(axis=1) for scores in (self.normal, self.anomalous))
        return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def detect_anomalies(
    normal: np.ndarray,
    anomalous: np.ndarray,
    method: str = "local-outlier-factor",
    *,
    held_out: float = 0.25,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Detection:
    """Fit a detector to a part of the normal examples, and test it on the others and the anomalous ones.

    The detector never sees an anomalous example, nor the normal ones that it is tested on.

    Args:
        normal: [N, ...] features of normal examples, N >= 4. They are divided at random.
        anomalous: [M, ...] features of anomalous examples.
        method: name in `DETECTORS`.
        held_out: fraction of the normal examples that the detector is tested on, between 0 and 1; 0.25 as in the paper's experiment.
        seed: seed of the division, the forest and the bootstrap.
        resamples, level: as in `metalens.analysis.bootstrap`.

    Raises:
        InvalidValueError: for too few examples, features of different lengths, or a fraction out of range; else as `fit_detector`.
        MissingPackageError: if scikit-learn is not installed.
    """
    usual, unusual = _rows(normal), _rows(anomalous)
    if usual.shape[1] != unusual.shape[1]:
        raise InvalidValueError(f"Normal and anomalous examples have {usual.shape[1]} and {unusual.shape[1]} features: both need the same.")
    tested = round(held_out * len(usual))
    if not 0 < held_out < 1 or tested < 1 or len(usual) - tested < 2:
        raise InvalidValueError(f"{len(usual)} normal examples can't be divided with held_out={held_out}: 2 to fit and 1 to test are the least.")
    order = np.random.default_rng(seed).permutation(len(usual))
    detector = fit_detector(usual[order[tested:]], method, seed=seed)
    a, b = detector.scores(usual[order[:tested]]), detector.scores(unusual)
    interval = bootstrap_auroc(a, b, resamples=resamples, level=level, seed=seed)
    return Detection(method, interval, len(usual) - tested, a, b)


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from JSON Lines, one in each line: the field "context", as questions have it, or "text".

    Raises:
        InvalidValueError: for a line without such a text, with the number of the line; and for a file without any.
        OSError: if the file can't be read.
    """
    records = JsonLines(Path(path), "text").records()
    return [text_of(record, "context" if isinstance(record, dict) and "context" in record else "text", where) for where, record in records]
