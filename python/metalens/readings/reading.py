"""The result of reading a text through a lens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from metalens.ops import LensStats
from metalens.readings.heat_map import lens_figure, save_figure
from metalens.readings.numbering import EMBEDDING, UNTRANSLATED, Layer
from metalens.readings.rows import select_position
from metalens.readings.top_tokens import Predictions, TopToken, predictions_of
from metalens.readings.trajectory import Trajectory
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError, MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib takes a second to import

Color = Literal["probability", "entropy"]


@dataclass(frozen=True, eq=False)
class Reading:
    """One text, read through one lens: the predictions of every layer, and the model's own beside them.

    Row r of the arrays belongs to layer `layers[r]`; the methods take layer numbers. Layer i is the output of block i.
    The embedding's output is the layer 'embedding', if it was asked for. A negative layer counts from the model's last block, a negative
    position from the last token that was read. It is a view of a trajectory, which has more statistics if they were asked for.

    Attributes:
        trajectory: the trajectory.
    """

    trajectory: Trajectory

    @cached_property
    def layers(self) -> list[Layer]:
        """Return the layers, in the order that was asked for, after the embedding."""
        return list(self.trajectory.layers)

    @cached_property
    def tokens(self) -> list[str]:
        """Return the text of each token that was read, T in number."""
        return self.trajectory.tokens

    @cached_property
    def token_ids(self) -> list[int]:
        """Return the id of each token that was read."""
        found: list[int] = self.trajectory.token_ids.tolist()
        return found

    @cached_property
    def stats(self) -> LensStats:
        """Return the statistics of the lens, [len(layers), T] arrays."""
        return self.trajectory.lens_stats()

    @cached_property
    def model(self) -> LensStats:
        """Return the statistics of the model's own prediction, [1, T] arrays."""
        return self.trajectory.model.lens_stats()

    @cached_property
    def model_tokens(self) -> list[str]:
        """Return the model's most likely next token at each position."""
        return [self.trajectory.texts[int(i)] for i in self.trajectory.model.top_ids[0, :, 0]]

    @cached_property
    def predictions(self) -> Predictions:
        """Return {layer: [[(token id, logit, token), ...] per position]}, the top-k tokens, most likely first."""
        return predictions_of(self.stats, self.layers, dict(self.trajectory.texts))

    @property
    def lens(self) -> str:
        """Return the name of the lens: 'logit lens', 'tuned lens', or the name of a function."""
        return self.trajectory.lens

    @property
    def num_layers(self) -> int:
        """Return L, the number of blocks of the model."""
        return self.trajectory.num_layers

    @property
    def untranslated(self) -> tuple[Layer, ...]:
        """Return the layers that were read of which the tuned lens has no translator.

        It reads them as the logit lens does. Tables and pictures mark them with a star.
        """
        return self.trajectory.untranslated

    def label(self, layer: Layer) -> str:
        """Return the name of a layer's row: 'layer 3', or 'layer 3*' if the lens does not translate it."""
        return self.trajectory.label(layer)

    def __repr__(self) -> str:
        text = "".join(self.tokens)
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        count = f"{len(self.tokens)} token{'s' if len(self.tokens) != 1 else ''}"
        return f"Reading({self.lens}, {len(self.layers)} of {self.num_layers} layers, {count}: {shown!r})"

    def _repr_html_(self) -> str:
        """Return the viewer's page with this reading, for notebooks."""
        return self.trajectory._repr_html_()

    @property
    def probabilities(self) -> mx.array:
        """Return the probabilities [len(layers), T, k] of the top-k tokens, most likely first."""
        return mx.exp(self.stats.top_logits - self.stats.lse[..., None])

    def row(self, layer: Layer) -> int:
        """Return the row of a layer in the arrays.

        Args:
            layer: layer number, negative from the model's last block, or 'embedding'.

        Raises:
            InvalidValueError: if this layer was not read.
        """
        number: Layer = layer + self.num_layers if layer != EMBEDDING and layer < 0 else layer
        if number not in self.layers:
            raise InvalidValueError(f"Layer {layer} was not read; this reading has layers {', '.join(map(str, self.layers))}.")
        return self.layers.index(number)

    def at_layer(self, layer: Layer) -> LensStats:
        """Return the statistics of one layer, [T] arrays (top_ids and top_logits [T, k]). Arguments and errors as in `row`."""
        row = self.row(layer)
        arrays: dict[str, Any] = {name: None if array is None else array[row] for name, array in vars(self.stats).items()}
        return LensStats(**arrays)

    def top(self, layer: Layer, position: int = -1) -> list[TopToken]:
        """Return the top-k next tokens of one layer at one position, most likely first.

        Args:
            layer: as in `row`.
            position: index among the tokens that were read, negative from the end.

        Raises:
            InvalidValueError: if this layer or position was not read.
        """
        row, column = self.row(layer), select_position(position, len(self.tokens)).start
        return self._top(row, column, to_list(self.probabilities[row, column]))

    def _top(self, row: int, column: int, probabilities: list[float]) -> list[TopToken]:
        best = self.predictions[self.layers[row]][column]
        return [TopToken(i, p, logit, token) for (i, logit, token), p in zip(best, probabilities, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the reading as JSON holds it.

        Returns:
            {"lens", "num_layers", "tokens": [T], "token_ids": [T], "layers": [{"layer", "translated", "entropy": [T],
            "max_probability": [T], "top": [T][k] of {"id", "probability", "logit", "token"}}, ...], "model":
            {"entropy": [T], "max_probability": [T], "tokens": [T]}}; entropies in nats.
        """
        probabilities = to_list(self.probabilities)
        layers = [
            {
                "layer": layer,
                "translated": layer not in self.untranslated,
                "entropy": to_list(self.stats.entropy[row]),
                "max_probability": to_list(self.stats.max_probability[row]),
                "top": [[best._asdict() for best in self._top(row, i, p)] for i, p in enumerate(probabilities[row])],
            }
            for row, layer in enumerate(self.layers)
        ]
        model = {
            "entropy": to_list(self.model.entropy[0]),
            "max_probability": to_list(self.model.max_probability[0]),
            "tokens": self.model_tokens,
        }
        about = {"lens": self.lens, "num_layers": self.num_layers, "tokens": self.tokens, "token_ids": self.token_ids}
        return about | {"layers": layers, "model": model}

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with one row per layer, position and rank.

        The columns are layer, translated (whether the lens translates the layer), position, token (the token that was
        read), rank (1 = most likely), id, prediction, probability, logit, and entropy (nats).

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingPackageError("Reading.to_pandas needs pandas: pip install pandas. Reading.to_dict needs no package.") from error
        records = [
            {
                "layer": entry["layer"],
                "translated": entry["translated"],
                "position": position,
                "token": self.tokens[position],
                "rank": rank,
                "id": best["id"],
                "prediction": best["token"],
                "probability": best["probability"],
                "logit": best["logit"],
                "entropy": entry["entropy"][position],
            }
            for entry in self.to_dict()["layers"]
            for position, top in enumerate(entry["top"])
            for rank, best in enumerate(top, 1)
        ]
        return pd.DataFrame.from_records(records)

    def plot(self, color: Color = "probability", title: str = "", **look: Any) -> Figure:
        """Draw a heat map: layers down to up, tokens left to right, the most likely next token in each cell, the model's own answer on top.

        Bright means certain. All probabilities share the scale from 0 to 1, so that two pictures can be compared.

        Args:
            color: the value that the color shows: 'probability' of the top token, or 'entropy' in nats.
            title: text above the picture.
            look: `max_display_tokens` (24), `figsize` in inches, `cmap` and `font_family`, as in
                `metalens.readings.heat_map.lens_figure`.

        Raises:
            InvalidValueError: if `color` is another word.
        """
        if color not in ("probability", "entropy"):
            raise InvalidValueError(f"color must be 'probability' or 'entropy', not {color!r}.")
        certain = color == "probability"
        values, of_model = (stats.max_probability if certain else stats.entropy for stats in (self.stats, self.model))
        if set(self.untranslated) & set(self.layers):
            title = f"{title} ({UNTRANSLATED})" if title else UNTRANSLATED
        options: dict[str, Any] = {"max_display_tokens": 24, "cmap": "viridis" if certain else "viridis_r", "limits": (0.0, 1.0) if certain else None}
        return lens_figure(
            self.predictions,
            self.tokens,
            values,
            "probability of the top token" if certain else "entropy (nats)",
            title=title,
            row_name=self.label,
            model_row=(self.model_tokens, to_list(of_model[0])),
            **options | look,
        )

    def save(self, path: str | Path, color: Color = "probability", title: str = "", *, force: bool = False, **look: Any) -> None:
        """Write the picture that `plot` draws. The suffix tells the format: .png, .pdf, .svg, ... The file appears whole or not at all.

        Args:
            path: path of the file.
            color, title, look: as in `plot`.
            force: replace a file that is not a picture.

        Raises:
            InvalidValueError: if matplotlib does not know the suffix, if the file exists and is not a picture, or as `plot`.
            OSError: if the file cannot be written.
        """
        save_figure(self.plot(color, title, **look), path, force=force)
