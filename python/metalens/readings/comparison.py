"""Compare two trajectories cell by cell: two lenses, two models with one vocabulary, two texts of equal length, or neighboring layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from metalens.ops import Head, lens_compare
from metalens.ops.compare import LensComparison
from metalens.readings.comparison_data import Between, ComparisonData
from metalens.readings.export import comparison_json, save_comparison
from metalens.readings.numbering import Layer
from metalens.readings.plotly_map import comparison_plotly
from metalens.readings.source import RowSource, part_size, parts_of
from metalens.readings.statistics import DIVERGENCES
from metalens.readings.trajectory_data import TrajectoryData
from metalens.readings.trajectory_map import contents_of_comparison, map_figure
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import

RENAMED = 0.01  # part of the vocabulary that may differ: models for chats rename a few special tokens


class Comparison(ComparisonData):
    """How far two predictions are apart: the arrays of `ComparisonData`, and what can be done with them."""

    def _repr_html_(self) -> str:
        """Return the viewer's page with this comparison, for notebooks."""
        from metalens.viewer.notebook import comparison_html

        return comparison_html(self.to_json(compact=True))

    def plot(self, divergence: str = "js", title: str = "", **look: Any) -> Figure:
        """Draw a divergence by matplotlib, rows by positions: see `metalens.readings.trajectory_map.map_figure`, which has the options.

        Args:
            divergence: 'kl', 'reverse_kl', 'js' or 'tv'.
            title: text above the picture.
            look: `cmap`, `figsize`.

        Raises:
            InvalidValueError: if there is no such divergence.
        """
        return map_figure(contents_of_comparison(self, divergence), title, **look)

    def figure(self, divergence: str = "js", title: str = "") -> Any:
        """Return an interactive figure by plotly: see `metalens.readings.plotly_map.comparison_plotly`."""
        return comparison_plotly(self, divergence, title)

    def to_json(self, *, compact: bool = False, trajectories: bool = True) -> dict[str, Any]:
        """Return the comparison as JSON holds it: see `metalens.readings.export.comparison_json`."""
        return comparison_json(self, compact=compact, trajectories=trajectories)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write a .json file: see `metalens.readings.export.save_comparison`."""
        save_comparison(self, path, force=force)


def compare(a: TrajectoryData, b: TrajectoryData) -> Comparison:
    """Compare two trajectories, cell by cell.

    Both texts are read again, in parts, and each row of a goes through the unembedding with the row of b in the same place. Two lenses on
    one text share one forward pass. On a CPU an unembedding is read twice for each part: once for the normalizers, once for the divergences.

    Args:
        a, b: trajectories with as many layers and as many positions, by one model or by two models with the same tokens.

    Raises:
        InvalidValueError: if the numbers of layers or positions differ, the vocabularies have different sizes or tokens, or a
            trajectory comes from a file.
        InvalidTypeError: if `b` is no trajectory.
    """
    if not isinstance(b, TrajectoryData):
        raise InvalidTypeError(f"A trajectory is compared with another trajectory, not with {type(b).__name__}.")
    source_a, source_b = a.require_source(), b.require_source()
    if len(a) != len(b):
        raise InvalidValueError(
            f"Cells are compared position by position: the texts have {len(a)} and {len(b)} tokens. Give texts of equal length, or select positions."
        )
    if len(a.layers) != len(b.layers):
        raise InvalidValueError(
            f"Cells are compared row by row: the trajectories have {len(a.layers)} and {len(b.layers)} layers. Select as many of each."
        )
    _require_one_vocabulary(a, b)
    values = join_divergences([*divergences_in_parts(source_a, source_b)])
    return Comparison(**values, between=_between(a, b), labels=_paired_labels(a, b), names=_names(a, b), a=a, b=b)


def compare_lenses(trajectories: Sequence[TrajectoryData], values: Sequence[dict[str, np.ndarray]]) -> list[Comparison]:
    """Return the comparisons of each lens but the first with the first one, on one text.

    Args:
        trajectories: one for each lens, n in number, with as many layers each.
        values: n - 1 results of `divergences_from_first`, or of `join_divergences` of them.
    """
    first = trajectories[0]
    return [
        Comparison(**each, between="lenses", labels=_paired_labels(t, first), names=(t.lens, first.lens), a=t, b=first)
        for t, each in zip(trajectories[1:], values, strict=True)
    ]


def compare_layers(trajectory: TrajectoryData) -> Comparison:
    """Compare the prediction of every layer with that of the next row: what each block changes.

    Args:
        trajectory: two layers or more, R in number.

    Returns:
        a comparison of R - 1 rows.

    Raises:
        InvalidValueError: if there is only one layer, or the trajectory comes from a file.
    """
    values = join_divergences([*layer_divergences_in_parts(require_layers(trajectory.require_source()))])
    labels = _labels(trajectory, trajectory.layers)
    steps = tuple(f"{before} -> {after}" for before, after in pairwise(labels))
    return Comparison(**values, between="layers", labels=steps, names=("layer", "next layer"), a=trajectory, b=trajectory)


def require_layers(source: RowSource) -> RowSource:
    """Return a source that has two layers or more (InvalidValueError if not)."""
    if len(source.layers) < 2:
        raise InvalidValueError("Neighboring layers are compared: read two layers or more.")
    return source


def _require_one_vocabulary(a: TrajectoryData, b: TrajectoryData) -> None:
    """Check that an id is the same token in both models. One without a tokenizer does not tell."""
    if a.vocab_size != b.vocab_size:
        raise InvalidValueError(
            f"Predictions are compared token by token: the models have {a.vocab_size} and {b.vocab_size} tokens. Use models with one vocabulary."
        )
    models = [a.require_source().model, b.require_source().model]
    if models[0].tokenizer is models[1].tokenizer or None in (models[0].tokenizer, models[1].tokenizer):
        return
    tokenizers = [model.plain_encoder.tokenizer for model in models]
    if all(hasattr(tokenizer, "get_vocab") for tokenizer in tokenizers):
        texts, others = ({i: text for text, i in tokenizer.get_vocab().items() if i < a.vocab_size} for tokenizer in tokenizers)
    else:
        ids = mx.array(sorted({*a.texts, *b.texts}))
        texts, others = (model.token_strings(ids) for model in models)
    both = texts.keys() & others.keys()
    different = [i for i in both if texts[i] != others[i]]
    if len(different) > RENAMED * len(both):
        i = min(different)
        raise InvalidValueError(
            f"Predictions are compared token by token: token {i} is {texts[i]!r:.60} in one model and {others[i]!r:.60} in the other, "
            f"and {len(different):,} of {len(both):,} tokens differ. Use models with one vocabulary."
        )


def divergences_in_parts(a: RowSource, b: RowSource, size: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Yield how far two sources are apart, {divergence: [R, c]}, for one part of the columns after another.

    Args:
        a, b: sources with as many layers and positions, and one vocabulary.
        size: columns of a part at most. None = as many as a bounded memory allows.
    """
    one_model, one_text = a.model is b.model, bool(mx.array_equal(a.ids, b.ids).item())
    shared = one_model and (not (a.mask_input or b.mask_input) or (a.mask_input and b.mask_input and one_text))
    head, head_b = a.head, None if shared else b.head
    if one_model and one_text and a.positions == b.positions:
        for (rows_a, rows_b), _ in parts_of([a, b], size):
            yield _divergences(lens_compare(rows_a, rows_b, head, head_b))
        return
    size = min(part_size([a]), part_size([b])) if size is None else size
    for rows_a, rows_b in _pairs(a, b, size):
        yield _divergences(lens_compare(rows_a, rows_b, head, head_b))


def layer_divergences_in_parts(source: RowSource, size: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Yield how far every layer is from the next row, {divergence: [R - 1, c]}. Otherwise as `divergences_in_parts`."""
    head = source.head
    for (rows,), _ in parts_of([source], size):
        yield _divergences(lens_compare(rows[:-1], rows[1:], head))


def divergences_from_first(rows: Sequence[mx.array], head: Head) -> list[dict[str, np.ndarray]]:
    """Return how far the rows [R, c, D] of each lens but the first are from those of the first: {divergence: [R, c]} for each."""
    return [_divergences(lens_compare(each, rows[0], head)) for each in rows[1:]]


def _pairs(a: RowSource, b: RowSource, size: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the rows of the same columns of both sources. Their parts may be cut at different places, if their texts begin elsewhere."""
    parts = [parts_of([source], size) for source in (a, b)]
    left: list[mx.array | None] = [None, None]
    done, total = 0, len(a.positions)
    while done < total:
        rows = [next(part)[0][0] if kept is None else kept for part, kept in zip(parts, left, strict=True)]
        count = min(each.shape[1] for each in rows)
        yield rows[0][:, :count], rows[1][:, :count]
        left = [each[:, count:] if each.shape[1] > count else None for each in rows]
        done += count


def _divergences(found: LensComparison) -> dict[str, np.ndarray]:
    values = [getattr(found, name) for name in DIVERGENCES]
    if to_float(mx.any(mx.isnan(mx.stack(values)))):
        raise InvalidValueError("The logits of some layer are NaN or infinite for this input: the model or the lens holds damaged weights.")
    return {name: np.array(value) for name, value in zip(DIVERGENCES, values, strict=True)}


def join_divergences(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join parts along the positions."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in DIVERGENCES}


def _between(a: TrajectoryData, b: TrajectoryData) -> Between:
    if a.require_source().model is not b.require_source().model:
        return "models"
    return "lenses" if np.array_equal(a.token_ids, b.token_ids) and a.first_position == b.first_position else "texts"


def _paired_labels(a: TrajectoryData, b: TrajectoryData) -> tuple[str, ...]:
    """Return the name of each row of a comparison: that of both sides, if they differ."""
    both = zip(_labels(a, a.layers), _labels(b, b.layers), strict=True)
    return tuple(label if label == other else f"{label} | {other}" for label, other in both)


def _labels(trajectory: TrajectoryData, layers: Sequence[Layer]) -> list[str]:
    return [trajectory.label(layer) for layer in layers]


def _names(a: TrajectoryData, b: TrajectoryData) -> tuple[str, str]:
    between = _between(a, b)
    if between == "lenses":
        return a.lens, b.lens
    if between == "models":
        return a.model_name or "model a", b.model_name or "model b"
    return "".join(a.tokens), "".join(b.tokens)
