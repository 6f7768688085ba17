"""Read weights through a lens: what the rows of a matrix that writes into the residual stream promote and suppress (the paper's Table 3).

A row is the column i of W [D, I]: what neuron i of an MLP, or one dimension of an attention head, adds to the residual stream. It is a
difference of hidden states, so the lens translates it by its matrix without its bias. The final norm then gives it the size of a hidden
state, and the unembedding decodes it. A direction has no sign of its own, so its opposite is decoded too.

Nothing is unpacked whole: a few columns are unpacked at a time, and the fused operation of readings finds their top tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.analysis.resampling import Interval
from metalens.analysis.roc import bootstrap_auroc
from metalens.lenses.lens import Lens, LogitLens, TunedLens, as_lens, lens_kind
from metalens.lenses.provenance import check_lens
from metalens.lenses.translators import parameters_of, translate
from metalens.models.block_matrices import OutputMatrix, head_circuit, number_of_heads, output_matrices
from metalens.models.language_model import LanguageModel
from metalens.ops import Head, Norm, lens_stats
from metalens.ops.stats import check_top_k
from metalens.ops.translate import normed
from metalens.ops.weight import unpacked_columns, unpacked_rows
from metalens.readings.chosen_tokens import token_ids_of
from metalens.readings.rows import require_finite, select_layers
from metalens.utils.errors import InvalidTypeError, InvalidValueError

CHUNK = 256  # rows that are unpacked at a time


@dataclass(frozen=True, eq=False)
class WeightReading:
    """N rows of a matrix, read through a lens.

    Attributes:
        layer: number of the block.
        path: dotted path of the matrix inside the block; for the circuit of a head 'head 3'.
        lens: name of the lens.
        sizes: [N] Euclidean norms of the rows; for the circuit of a head its singular values.
        cosines: [N] cosine of each row with its translation; 1 for the logit lens.
        top_ids, top_probabilities: [N, k] the tokens that the row promotes most, most likely first.
        bottom_ids, bottom_probabilities: [N, k] those that its opposite promotes.
        coherence: [N] mean cosine between the unembedding's rows of two of the k tokens, less the mean of all its rows; of the row or its
            opposite, whichever is larger. NaN for k = 1.
        texts: {id: text} of every id in this reading.
        mass, opposite_mass: [N] probability that a row, and its opposite, give all chosen tokens together, 0 to 1; None without chosen tokens.
    """

    layer: int
    path: str
    lens: str
    sizes: np.ndarray
    cosines: np.ndarray
    top_ids: np.ndarray
    top_probabilities: np.ndarray
    bottom_ids: np.ndarray
    bottom_probabilities: np.ndarray
    coherence: np.ndarray
    texts: dict[int, str] = field(default_factory=dict)
    mass: np.ndarray | None = None
    opposite_mass: np.ndarray | None = None

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self.sizes)

    def strongest(self, count: int, by: str = "coherence") -> np.ndarray:
        """Return the numbers of the rows with the largest coherence, size, cosine, top probability or mass, largest first.

        Args:
            count: rows to return, at most.
            by: 'coherence', 'size', 'cosine' or 'probability'; with chosen tokens also 'mass', of the row or its opposite, whichever is larger.

        Raises:
            InvalidValueError: for another word.
        """
        keys = {
            "coherence": np.nan_to_num(self.coherence, nan=-np.inf),
            "size": self.sizes,
            "cosine": self.cosines,
            "probability": np.maximum(self.top_probabilities[:, 0], self.bottom_probabilities[:, 0]),
        }
        if self.mass is not None and self.opposite_mass is not None:
            keys["mass"] = np.maximum(self.mass, self.opposite_mass)
        if by not in keys:
            raise InvalidValueError(f"Rows are ordered by {', '.join(keys)}, not by {by!r:.40}.")
        found: np.ndarray = np.argsort(-keys[by], kind="stable")[:count]
        return found

    def to_dict(self, rows: Sequence[int] | np.ndarray | None = None) -> dict[str, Any]:
        """Return some rows as JSON holds them; None = all."""
        chosen = range(len(self)) if rows is None else [int(row) for row in rows]

        def tokens(ids: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
            return [{"id": int(i), "token": self.texts.get(int(i), str(i)), "probability": float(p)} for i, p in zip(ids, probabilities, strict=True)]

        return {
            "layer": self.layer,
            "matrix": self.path,
            "lens": self.lens,
            "rows": [
                {
                    "row": row,
                    "size": float(self.sizes[row]),
                    "cosine": float(self.cosines[row]),
                    "coherence": None if np.isnan(self.coherence[row]) else float(self.coherence[row]),
                    "promotes": tokens(self.top_ids[row], self.top_probabilities[row]),
                    "suppresses": tokens(self.bottom_ids[row], self.bottom_probabilities[row]),
                }
                | self._masses(row)
                for row in chosen
            ],
        }

    def _masses(self, row: int) -> dict[str, float]:
        if self.mass is None or self.opposite_mass is None:
            return {}
        return {"mass": float(self.mass[row]), "opposite_mass": float(self.opposite_mass[row])}


def read_weights(
    model: LanguageModel,
    lens: Lens | str | Path | None = None,
    *,
    which: str = "mlp",
    layers: Sequence[int] | None = None,
    rows: range | None = None,
    top_k: int = 10,
    tokens: Sequence[str | int] = (),
) -> Iterator[WeightReading]:
    """Read the output matrices of blocks through a lens, one matrix after another. The arguments are checked at once.

    A row takes two rows through the unembedding.

    Args:
        model: the model, quantized or not.
        lens: a TunedLens of this model, the path of one, or None = the logit lens.
        which: 'mlp', 'attention', 'ov' = the singular directions of every head's value-output circuit, or the dotted path of a matrix inside
            the block.
        layers: layer numbers, negative from the end; None = all.
        rows: rows of each matrix to read; None = all.
        top_k: tokens to keep of each row, 1 to V.
        tokens: tokens of a concept, as texts or ids. Each row and its opposite get the probability of all of them together, by which
            `WeightReading.strongest` ranks the rows (the paper's Table 4, where the concept is toxicity).

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for a text that is no single token, an unknown layer, a block without such a matrix, rows that it does not have, top_k
            out of range, or a lens of another model.
        InvalidTypeError: for a lens that is a function: only an affine map has a part without bias.
    """
    reader = _RowReader(model, as_lens(lens), top_k, tokens)
    blocks = select_layers(layers, model.num_layers)
    size = model.unembed.hidden_dim
    if which == "ov":
        circuits = [(block, head) for block in blocks for head in range(number_of_heads(model.source.layers[block], size))]
        return (reader.circuit(block, head, rows) for block, head in circuits)
    matrices = [(block, matrix) for block in blocks for matrix in output_matrices(model.source.layers[block], which, size)]
    for block, matrix in matrices:
        _check_rows(rows, matrix.weight.shape[1], f"{matrix.path} of block {block}")
    return (reader.matrix(block, matrix, rows) for block, matrix in matrices)


def read_directions(
    model: LanguageModel,
    directions: np.ndarray,
    layer: int,
    lens: Lens | str | Path | None = None,
    *,
    top_k: int = 10,
    tokens: Sequence[str | int] = (),
) -> WeightReading:
    """Read directions of the residual stream through a lens, as `read_weights` reads the rows of a matrix.

    Args:
        model: the model.
        directions: [N, D] differences of hidden states after block `layer`, for example steering vectors.
        layer: number of the block, negative from the end.
        lens, top_k, tokens: as in `read_weights`.

    Raises:
        FileNotFoundError, InvalidValueError, InvalidTypeError: as `read_weights`, and for directions of another shape or not finite.
    """
    reader = _RowReader(model, as_lens(lens), top_k, tokens)
    (block,) = select_layers([layer], model.num_layers)
    rows = np.asarray(directions, np.float32)
    if rows.ndim != 2 or rows.shape[1] != model.unembed.hidden_dim or not len(rows) or not np.isfinite(rows).all():
        raise InvalidValueError(f"Directions must be finite numbers [N, {model.unembed.hidden_dim}], got an array {rows.shape}.")
    return reader.read(block, "directions", (mx.array(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)))


def concept_tokens(model: LanguageModel, words: Iterable[str]) -> tuple[list[int], list[str]]:
    """Return the tokens that words are, as they stand and with a space before them, and the words that are no single token.

    Args:
        model: the model.
        words: the words of a concept. Empty ones are passed over.
    """
    found: dict[int, None] = {}
    left_out = []
    for word in filter(None, words):
        known = [token for spelling in dict.fromkeys((word, f" {word.lstrip(' ')}")) for token in _single_token(model, spelling)]
        found |= dict.fromkeys(known)
        left_out += [] if known else [word]
    return list(found), left_out


def _single_token(model: LanguageModel, text: str) -> tuple[int, ...]:
    try:
        return token_ids_of(model, [text])
    except InvalidValueError:
        return ()


def random_directions(model: LanguageModel, count: int, seed: int = 0) -> np.ndarray:
    """Return random directions [count, D] of a normal distribution: what the rows of a matrix are compared with.

    Args:
        model: the model.
        count: number of directions.
        seed: seed of the numbers. NumPy's global state is left alone.
    """
    found: np.ndarray = np.random.default_rng(seed).standard_normal((count, model.unembed.hidden_dim)).astype(np.float32)
    return found


def coherence_auroc(reading: WeightReading, baseline: WeightReading, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return how often a row's top tokens are more alike than those of a random direction: 0.5 = as often as not (the paper's Table 3).

    Args:
        reading: rows of a matrix.
        baseline: `random_directions`, read at the same layer through the same lens.
        resamples, level, seed: as in `metalens.analysis.bootstrap`; the interval is over rows.

    Raises:
        InvalidValueError: for readings of one token for each row, which have no coherence.
    """
    if np.isnan(reading.coherence).any() or np.isnan(baseline.coherence).any():
        raise InvalidValueError("The coherence of a row needs two tokens: read it with a top_k of 2 or more.")
    return bootstrap_auroc(baseline.coherence, reading.coherence, resamples=resamples, level=level, seed=seed)


def _check_rows(rows: range | None, count: int, name: str) -> range:
    """Return the rows to read of a matrix that has `count` (InvalidValueError)."""
    found = range(count) if rows is None else rows
    if not len(found) or found.step != 1 or found.start < 0 or found.stop > count:
        raise InvalidValueError(f"{name} has the rows 0 to {count - 1}, not {found.start} to {found.stop - 1}.")
    return found


class _RowReader:
    """Reads rows of one model through one lens."""

    def __init__(self, model: LanguageModel, lens: Lens, top_k: int, tokens: Sequence[str | int] = ()) -> None:
        if not isinstance(lens, (LogitLens, TunedLens)):
            raise InvalidTypeError(
                f"Weights are read through a tuned lens or the logit lens, not {lens_kind(lens)}: only an affine map has a part without bias."
            )
        check_lens(lens, model)
        check_top_k(top_k, model.unembed.head.tokens)
        self.model, self.lens, self.top_k = model, lens, top_k
        self.head: Head = model.unembed.head
        self.norm: Norm = model.unembed.norm
        chosen = token_ids_of(model, tokens)
        self.labels = mx.array(chosen)[None].astype(mx.int32) if chosen else None
        self._center: mx.array | None = None

    def matrix(self, block: int, matrix: OutputMatrix, rows: range | None) -> WeightReading:
        """Read rows of a matrix."""
        chosen = _check_rows(rows, matrix.weight.shape[1], matrix.path)
        starts = range(chosen.start, chosen.stop, CHUNK)
        return self.read(block, matrix.path, (unpacked_columns(matrix.weight, start, min(start + CHUNK, chosen.stop)) for start in starts))

    def circuit(self, block: int, head: int, rows: range | None) -> WeightReading:
        """Read the directions that an attention head writes, strongest first."""
        sizes, directions = head_circuit(self.model.source.layers[block], head, self.model.unembed.hidden_dim).directions()
        chosen = _check_rows(rows, len(sizes), f"head {head} of block {block}")
        where = slice(chosen.start, chosen.stop)
        return self.read(block, f"head {head}", [mx.array(directions[where].astype(np.float32))], sizes[where])

    def read(self, block: int, path: str, chunks: Any, sizes: np.ndarray | None = None) -> WeightReading:
        """Read chunks of rows [c, D]."""
        parts = [self._read_chunk(block, rows) for rows in chunks]
        joined = (np.concatenate(each, axis=0 if each[0].ndim == 1 else 1) for each in zip(*parts, strict=True))
        norms, cosines, ids, probabilities, coherence, masses = joined
        texts = self.model.token_strings(mx.array(np.unique(ids)))
        return WeightReading(
            block,
            path,
            lens_kind(self.lens),
            norms if sizes is None else sizes,
            cosines,
            ids[0],
            probabilities[0],
            ids[1],
            probabilities[1],
            coherence,
            texts,
            *(masses if self.labels is not None else (None, None)),
        )

    def _read_chunk(self, block: int, rows: mx.array) -> tuple[np.ndarray, ...]:
        """Return sizes [c], cosines [c], token ids and probabilities [2, c, k] of rows and their opposites, coherence [c], masses [2, c]."""
        turned = self._translated(block, rows)
        labels = None if self.labels is None else mx.broadcast_to(self.labels, (len(rows), self.labels.shape[1]))
        stats = lens_stats(normed(mx.stack([turned, -turned]), self.norm).astype(mx.float32), self.head, self.top_k, labels=labels)
        require_finite(stats)
        sizes, after = mx.linalg.norm(rows, axis=-1), mx.linalg.norm(turned, axis=-1)
        cosines = mx.sum(rows * turned, axis=-1) / mx.maximum(sizes * after, 1e-30)
        probabilities = mx.exp(stats.top_logits - stats.lse[..., None])
        masses = np.zeros((2, len(rows))) if stats.nll is None else np.exp(-np.array(stats.nll)).sum(axis=-1, dtype=np.float64)
        return np.array(sizes), np.array(cosines), np.array(stats.top_ids), np.array(probabilities), self._coherence(stats.top_ids), masses

    def _translated(self, block: int, rows: mx.array) -> mx.array:
        """Apply the lens's matrix, without its bias."""
        if isinstance(self.lens, LogitLens):
            return rows
        parameters = parameters_of(self.lens.translator(block, rows.shape[-1]))
        return translate({name: array for name, array in parameters.items() if name != "bias"}, rows)

    def _coherence(self, ids: mx.array) -> np.ndarray:
        """Return the larger coherence [c] of the two lists of ids [2, c, k]."""
        k = ids.shape[-1]
        if k < 2:
            return np.full(ids.shape[1], np.nan)
        rows = unpacked_rows(self.head.weight, ids.reshape(-1)) - self.center
        rows = rows / mx.maximum(mx.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
        total = mx.sum(rows.reshape(*ids.shape, -1), axis=-2)  # the sum of all cosines is the square of the sum of unit rows
        both = np.array((mx.sum(total * total, axis=-1) - k) / (k * (k - 1)))
        found: np.ndarray = both.max(axis=0)
        return found

    @property
    def center(self) -> mx.array:
        """Return the mean of the unembedding's rows [D], summed in chunks once."""
        if self._center is None:
            count = self.head.tokens
            total = mx.zeros((self.head.weight.shape[1],))
            for start in range(0, count, 16 * CHUNK):
                total = total + mx.sum(unpacked_rows(self.head.weight, mx.arange(start, min(start + 16 * CHUNK, count))), axis=0)
                mx.eval(total)
            self._center = total / count
        return self._center
