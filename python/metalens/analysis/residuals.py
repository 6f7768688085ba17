"""Mean and covariance of hidden states, streamed in float64, and what they say of layers: rogue dimensions, effective rank, similarity."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import mlx.core as mx
import numpy as np

from metalens.analysis.resampling import Interval, bootstrap, spearman
from metalens.analysis.sequences import sequences_of
from metalens.evaluation.text import EvaluationText
from metalens.models.language_model import LanguageModel
from metalens.models.layers import layers_in_order
from metalens.readings.numbering import Layer
from metalens.readings.rows import select_layers
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar

# A dimension is rogue if its standard deviation is so many times that of the median dimension.
ROGUE_FACTOR = 6.0


class ResidualStatistics:
    """Mean and covariance of vectors [N, D] that come in parts of any size, in float64.

    Parts are centered before they are multiplied, and joined by the formula of Chan, Golub and LeVeque (1983). So nothing is lost where
    the mean is large beside the spread.

    Args:
        width: D.

    Attributes:
        width: as given.
        count: N, number of vectors so far.
        mean: [D] their mean.
        mean_norm: mean of their Euclidean lengths.
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self.mean = np.zeros(width)
        self.mean_norm = 0.0
        self._scatter = np.zeros((width, width))

    def add(self, rows: mx.array | np.ndarray) -> None:
        """Add vectors [N, D].

        Raises:
            InvalidValueError: if they have another width, or one is not finite.
        """
        wide = rows.astype(mx.float32) if isinstance(rows, mx.array) else rows
        x = np.array(wide).astype(np.float64)
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InvalidValueError(f"These statistics are of vectors [N, {self.width}], got {x.shape}.")
        if not np.isfinite(x).all():
            raise InvalidValueError("Hidden states are NaN or infinite: the model holds damaged weights, or is float16 and overflows.")
        if not len(x):
            return
        part = ResidualStatistics(self.width)
        part.count, part.mean = len(x), x.mean(axis=0)
        part.mean_norm = float(np.linalg.norm(x, axis=1).mean())
        centered = x - part.mean
        part._scatter = centered.T @ centered
        self.merge(part)

    def merge(self, other: ResidualStatistics) -> None:
        """Add the vectors of other statistics of the same width (InvalidValueError if the widths differ)."""
        if other.width != self.width:
            raise InvalidValueError(f"Statistics of width {self.width} and {other.width} can't be joined.")
        total = self.count + other.count
        if not total:
            return
        shift = other.mean - self.mean
        self._scatter += other._scatter + np.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.mean_norm += (other.mean_norm - self.mean_norm) * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Return the sample covariance [D, D], divided by N - 1 (InvalidValueError for fewer than two vectors)."""
        if self.count < 2:
            raise InvalidValueError(f"A covariance needs two vectors, and there are {self.count}. Read a longer text.")
        found: np.ndarray = self._scatter / (self.count - 1)
        return found

    @property
    def variance(self) -> np.ndarray:
        """Return the variance [D] of each dimension."""
        return np.diag(self.covariance).copy()


def residual_statistics(
    model: LanguageModel,
    text: EvaluationText,
    *,
    layers: Sequence[int] | None = None,
    embedding: bool = True,
    skip: int = 1,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: bool = True,
    show_progress: bool = False,
) -> dict[Layer, ResidualStatistics]:
    """Collect mean and covariance of the hidden states of each layer.

    Memory: 8 D^2 bytes for each layer. Work: D^2 multiplications in float64 for each position and layer.

    Args:
        model: the model.
        text: as in `metalens.evaluate`.
        layers: layer numbers, negative from the end; None = all.
        embedding: also collect those of the embedding's output.
        skip: positions at the start of each sequence to leave out. Many models have hidden states of another size at the first one.
        max_seq_len, max_tokens, bos: as in `metalens.analysis.sequences_of`.
        show_progress: show a progress bar on stderr.

    Returns:
        {layer: statistics}, the embedding first.

    Raises:
        InvalidValueError: for an empty text, one without positions after the skipped ones, or an unknown layer.
    """
    chosen = layers_in_order(select_layers(layers, model.num_layers), embedding)
    if skip < 0:
        raise InvalidValueError(f"skip must be 0 or more positions, got {skip}.")
    sequences = sequences_of(model, text, max_seq_len=max_seq_len, max_tokens=max_tokens, bos=bos)
    found = {layer: ResidualStatistics(model.unembed.hidden_dim) for layer in chosen}
    with token_bar(sum(ids.size for ids in sequences), "collecting", show_progress) as bar:
        for ids in sequences:
            states = model.source.capture(ids[None], with_embedding=embedding)
            stream = {layer: states.of(layer) for layer in chosen}
            mx.eval(stream)
            for layer, h in stream.items():
                assert h is not None
                found[layer].add(h[0, skip:])
            bar.update(ids.size)
    if found and next(iter(found.values())).count < 2:
        raise InvalidValueError(f"Fewer than two positions are left after the first {skip} of each sequence. Give a longer text or a smaller skip.")
    return found


def rogue_dimensions(statistics: ResidualStatistics, factor: float = ROGUE_FACTOR) -> list[int]:
    """Return the dimensions whose standard deviation is more than `factor` times the median's, largest first.

    Such dimensions dominate cosines and covariances (Timkey and van Schijndel 2021). The paper removes two of them from Pythia-12B.
    """
    deviation = np.sqrt(statistics.variance)
    order = np.argsort(-deviation, kind="stable")
    return [int(i) for i in order if deviation[i] > factor * np.median(deviation)]


def effective_rank(covariance: np.ndarray) -> float:
    """Return the effective rank of a covariance [D, D], 1 to D: e to the entropy of its eigenvalues as fractions of their sum.

    Source: Roy and Vetterli 2007, of the eigenvalues; tuned-lens's v0.0.3. 0 for a covariance of 0.
    """
    values = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    if not values.sum() > 0:
        return 0.0
    fractions = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(fractions * np.log(fractions))))


def covariance_similarity(a: np.ndarray, b: np.ndarray, leave_out: Collection[int] = ()) -> float:
    """Return the Frobenius cosine of two covariances [D, D]: tr(A B) / (|A| |B|), 0 to 1; NaN if one of them is 0.

    Source: Belrose et al. 2023, section 3.3 and figure 7.

    Args:
        a, b: symmetric matrices.
        leave_out: dimensions to leave out, for example rogue ones.
    """
    kept = np.setdiff1d(np.arange(len(a)), list(leave_out))
    x, y = a[np.ix_(kept, kept)], b[np.ix_(kept, kept)]
    sizes = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.sum(x * y)) / sizes if sizes > 0 else float("nan")


def similarity_matrix(statistics: Sequence[ResidualStatistics], leave_out: Collection[int] = ()) -> np.ndarray:
    """Return the covariance similarities [R, R] of layers to each other."""
    covariances = [each.covariance for each in statistics]
    matrix = np.ones((len(covariances), len(covariances)))
    for i, a in enumerate(covariances):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = covariance_similarity(a, covariances[j], leave_out)
    return matrix


def transfer_correlation(similarity: np.ndarray, penalty: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Correlate the similarity of layers with the penalty of reading one with the other's translator (Belrose et al. 2023, figure 6).

    Pairs that share a layer are not independent, so the bootstrap draws layers, and takes the pairs of different layers among them.

    Args:
        similarity: [L, L] similarities.
        penalty: [L, L] transfer penalties, as `metalens.evaluation.Transfer` has them.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        Spearman's rank correlation over all pairs of different layers, with its interval.

    Raises:
        InvalidValueError: if the matrices have different shapes.
    """
    if similarity.shape != penalty.shape or similarity.ndim != 2:
        raise InvalidValueError(f"Similarities and penalties must be matrices of one shape [L, L], got {similarity.shape} and {penalty.shape}.")

    def correlation(chosen: np.ndarray) -> float:
        different = chosen[:, None] != chosen[None, :]
        x, y = (matrix[np.ix_(chosen, chosen)][different] for matrix in (similarity, penalty))
        return spearman(x, y)

    return bootstrap(correlation, len(similarity), resamples=resamples, seed=seed)
