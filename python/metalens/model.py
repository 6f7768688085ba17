"""InterpretableModel: a language model with its lenses, in the API of mlxterp's Tutorials 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.lenses.lens import Lens, LogitLens, TunedLens
from metalens.lenses.provenance import check_lens
from metalens.models.capture import Edit
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.models.trace import LayerProxy, Trace, layer_index
from metalens.models.unembed import NormFunction
from metalens.ops import Head, Weight, lens_stats
from metalens.ops.stats import check_top_k
from metalens.ops.stats import top_k as largest
from metalens.readings.reader import read
from metalens.readings.reading import Predictions, Reading
from metalens.training import Progress, TrainingConfig, train
from metalens.training.data.inputs import joined_ids
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidTypeError, InvalidValueError


class InterpretableModel(LanguageModel):
    """A frozen language model, seen through lenses.

    Takes the arguments of `LanguageModel`, and has its attributes.
    """

    _trace: Trace | None = None

    @cached_property
    def layers(self) -> list[LayerProxy]:
        """Return one proxy per block."""
        return [LayerProxy(self, i) for i in range(self.num_layers)]

    def parameters(self) -> Any:
        """Return the parameters of the wrapped model."""
        return self.model.parameters()

    def trainable_parameters(self) -> Any:
        """Return the trainable parameters of the wrapped model."""
        return self.model.trainable_parameters()

    def named_modules(self) -> Any:
        """Return the modules of the wrapped model, by name."""
        return self.model.named_modules()

    def trace(self, inputs: TokenInput | list[str], interventions: Mapping[str | int, Edit] | None = None) -> Trace:
        """Run the model once, at the start of a `with` block, and offer what its blocks returned.

        Args:
            inputs: text, texts (padded on the right with token 0, unmasked), ids or an array of ids.
            interventions: for some blocks (by index, or by a name that ends in layers.<i>), a function of their output [B, T, D] to put in its place.

        Returns:
            a context manager with `activations` {"model.model.layers.0": [B, T, D], ..., "__model_output__": [B, T, V]} and `output`.
        """
        edits = {layer_index(key, self.num_layers): edit for key, edit in (interventions or {}).items()}
        return Trace(self, self.ids(inputs), edits)

    # ------------------------------------------------------------------ lenses

    def logit_lens(
        self,
        text: TokenInput,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        plot: bool = False,
        max_display_tokens: int = 15,
        figsize: tuple[float, float] = (16, 10),
        cmap: str = "viridis",
        font_family: str | None = None,
        final_norm: NormFunction | None = None,
        skip_norm: bool = False,
    ) -> Predictions:
        """What each block's output would predict if it were the last: norm, head, top-k.

        Args:
            text: a string, a list of ids or an array of ids; of a batch, row 0 is read.
            top_k: predictions per position, 1 to V.
            layers: block indices, None for all.
            position: one token only, negative from the end; None for all.
            plot: also show a layer x token heat map.
            max_display_tokens: the plot's last columns.
            figsize, cmap, font_family: of the plot.
            final_norm: used in place of the model's own.
            skip_norm: decode without a norm.

        Returns:
            {layer: [[(token id, logit, token), ...] per position]}, best first. Layer i is the output of block i.

        Raises:
            ValueError: for empty text, ids outside the vocabulary, an unknown layer, a position or top_k out of range, and a model whose own logits
                its norm and head do not reproduce.
        """
        return self.tuned_lens(
            text, LogitLens(), top_k, layers, position, plot, max_display_tokens, figsize, cmap, font_family, final_norm, skip_norm
        )

    def tuned_lens(
        self,
        text: TokenInput,
        tuned_lens: TunedLens | Lens,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        plot: bool = False,
        max_display_tokens: int = 15,
        figsize: tuple[float, float] = (16, 10),
        cmap: str = "viridis",
        font_family: str | None = None,
        final_norm: NormFunction | None = None,
        skip_norm: bool = False,
    ) -> Predictions:
        """`logit_lens`, with each block's output first translated by a lens.

        Args:
            tuned_lens: a TunedLens of this model, or any function (hidden [..., D], layer) -> [..., D].
            text, top_k, layers, position, plot, max_display_tokens, figsize, cmap, font_family, final_norm, skip_norm: as in `logit_lens`.

        Raises:
            ValueError: as `logit_lens`, and if the lens was made for another model.
        """
        if layers is not None and len(layers) == 0:
            return {}
        reading = self.read(text, tuned_lens, top_k, layers, position, final_norm, skip_norm)
        if plot:
            from metalens.readings.heat_map import show_lens  # matplotlib takes a second to import

            look = {"max_display_tokens": max_display_tokens, "figsize": figsize, "cmap": cmap, "font_family": font_family}
            show_lens(reading.predictions, reading.tokens, reading.stats.max_probability, "probability of the top token", **look)
        return reading.predictions

    def read(
        self,
        text: TokenInput,
        lens: Lens | None = None,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        final_norm: NormFunction | None = None,
        skip_norm: bool = False,
    ) -> Reading:
        """Read a text through a lens: see `metalens.readings.read`."""
        return read(self, text, lens, top_k, layers, position, final_norm, skip_norm)

    def check_lens(self, lens: Lens) -> None:
        """Check that a lens fits this model: see `metalens.lenses.provenance.check_lens`."""
        check_lens(lens, self, stacklevel=4)

    def get_token_predictions(
        self,
        hidden_state: mx.array,
        top_k: int = 10,
        return_scores: bool = False,
        embedding_layer: Any = None,
        lm_head: Any = None,
    ) -> list[Any]:
        """The most likely tokens of hidden states that are ready for the head (after the final norm).

        Args:
            hidden_state: [D] or [N, D].
            top_k: 1 to V.
            return_scores: return (id, logit) pairs instead of ids.
            embedding_layer, lm_head: used in place of the model's own head (lm_head goes first).

        Returns:
            a list of ids or pairs, best first; for [N, D] one such list per row.

        Raises:
            ValueError: for another number of dimensions, or top_k out of range.
        """
        if hidden_state.ndim not in (1, 2):
            raise InvalidValueError(f"hidden_state must be [D] or [N, D], got {hidden_state.shape}. Index a batch before passing it.")
        rows = hidden_state.reshape(-1, hidden_state.shape[-1])
        if lm_head is not None:
            logits = lm_head(rows).astype(mx.float32)
            check_top_k(top_k, logits.shape[-1])
            ids, scores = largest(logits, top_k)
        else:
            stats = lens_stats(rows[None], self.unembed.head if embedding_layer is None else _head_of(embedding_layer), top_k)
            ids, scores = stats.top_ids[0], stats.top_logits[0]
        result = to_list(ids)
        if return_scores:
            result = [list(zip(i, z, strict=True)) for i, z in zip(result, to_list(scores), strict=True)]
        return result[0] if hidden_state.ndim == 1 else result

    def train_tuned_lens(
        self,
        dataset: Sequence[str] | Sequence[Sequence[int]],
        num_steps: int = 250,
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        max_seq_len: int = 2048,
        gradient_clip: float = 1.0,
        save_path: str | Path | None = None,
        verbose: bool = True,
        callback: Callable[[int, float], None] | None = None,
    ) -> TunedLens:
        """Train a lens for this model with the arguments and the recipe of mlxterp: one sequence per step, SGD with Nesterov momentum.

        `metalens.train` has all recipes, reads files, and writes checkpoints.

        Args:
            dataset: texts, which are joined with a space; or lists of ids, which are joined.
            num_steps: number of optimizer steps.
            learning_rate: learning rate at the first step; it falls linearly to 0.
            momentum: momentum of SGD.
            max_seq_len: tokens per sequence, at least 10. The text must hold one sequence or more.
            gradient_clip: largest gradient norm over all layers together.
            save_path: path of the lens, which is checked before the training. None = only return it.
            verbose: show a progress bar on stderr.
            callback: function of (step, loss before the update) that is called after every step.

        Raises:
            InvalidValueError: for an empty or too short dataset, settings out of range, or a model without a head.
            OSError: if save_path can't be written.
        """
        config = TrainingConfig(num_steps, max_seq_len, None, learning_rate, momentum, gradient_clip)
        try:
            ids, _ = self.training_ids(dataset), self.unembed
        except AttributeError as error:
            raise InvalidValueError(f"Could not find output projection (lm_head or embedding) in model. {error}") from error

        def report(progress: Progress) -> None:
            if callback is not None:
                callback(progress.step, progress.loss)

        return train(self, ids, recipe="mlxterp", config=config, out=save_path, checkpoint_every=None, callbacks=[report], show_progress=verbose)

    def training_ids(self, dataset: Sequence[Any]) -> mx.array:
        """Return texts, joined with a space, or lists of ids, joined, as token ids [tokens].

        Raises:
            InvalidValueError: if there are none, if all texts are blank, or if ids lie outside the vocabulary.
        """
        dataset = [dataset] if isinstance(dataset, str) else dataset
        if len(dataset) == 0:
            raise InvalidValueError("Dataset is empty. Provide a list of texts to train on.")
        if not all(isinstance(entry, str) for entry in dataset):
            ids = joined_ids(dataset)
            if not ids.size:
                raise InvalidValueError("Dataset is empty. Provide token ids to train on.")
            return self.admit_training_ids(ids)
        if not any(entry.strip() for entry in dataset):
            raise InvalidValueError("Dataset contains only empty or whitespace strings. Provide texts with content.")
        return self.admit_training_ids(np.asarray(self.encode(" ".join(dataset)), dtype=np.int64))

    def admit_training_ids(self, ids: np.ndarray) -> mx.array:
        """Check training ids against the vocabulary (InvalidValueError)."""
        return self.check_ids(ids)

    def load_tuned_lens(self, path: str | Path) -> TunedLens:
        """Read a lens from `<path>.npz` and `<path>.json`.

        Raises:
            FileNotFoundError, ValueError: as `TunedLens.load`, and if the lens was made for another model.
        """
        lens = TunedLens.load(path)
        self.check_lens(lens)
        return lens


def train_tuned_lens(
    model: InterpretableModel,
    dataset: Sequence[str] | Sequence[Sequence[int]],
    num_steps: int = 250,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    max_seq_len: int = 2048,
    gradient_clip: float = 1.0,
    save_path: str | Path | None = None,
    verbose: bool = True,
    callback: Callable[[int, float], None] | None = None,
) -> TunedLens:
    """`InterpretableModel.train_tuned_lens` as a function."""
    return model.train_tuned_lens(dataset, num_steps, learning_rate, momentum, max_seq_len, gradient_clip, save_path, verbose, callback)


def _head_of(embedding: Any) -> Head:
    if not isinstance(embedding, nn.Module) or "weight" not in embedding:
        raise InvalidTypeError(f"embedding_layer must be an mlx.nn embedding or linear layer, not {type(embedding).__name__}.")
    return Head(Weight.from_layer(embedding))


def load(name: str | Path, **options: Any) -> InterpretableModel:
    """Load a model and its tokenizer.

    Args:
        name: a folder in mlx-lm's format, a hub id, or 'demo' for the small model that comes with metalens.
        options: as in `InterpretableModel`.

    Raises:
        InvalidValueError: if there is no such model.
    """
    return InterpretableModel(name, **options)
