"""Lenses: functions of a block's output that come before the unembedding.

`LogitLens` is the identity. `TunedLens` applies a trained affine map per block. Any function
(hidden [..., D], layer) -> [..., D] is a lens too.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.lenses.lens_file import LensData, LensDescription, lens_outputs, write_lens
from metalens.lenses.opening import read_lens_at
from metalens.lenses.translators import (
    VARIANTS,
    BiasTranslator,
    LowRankTranslator,
    NoTranslator,
    Translator,
    dense,
    identity_linear,
    parameters_of,
    translate,
)
from metalens.models.layers import EMBEDDING, Layer
from metalens.utils.errors import InvalidValueError
from metalens.utils.outputs import require_replaceable
from metalens.utils.warn import warn_caller

# A function (hidden [..., D], layer) -> [..., D]. TunedLens and LogitLens are such functions.
Lens = Callable[[mx.array, int], mx.array]

# Random key of the embedding's translator of low rank, plus the seed. Those of blocks are smaller.
EMBEDDING_KEY = 1 << 32

_EMBEDDING_RENAMED = (
    "TunedLens.embedding, (A, b) of y = h + A h + b, is now TunedLens.embedding_translator, a translator like those of blocks; "
    "the old name will be removed in the next release."
)
_RENAMED = "TunedLens.origin is now TunedLens.provenance; the old name will be removed in the next release."


class LogitLens:
    """The identity: decode the residual stream as if the last block had already run (nostalgebraist 2020)."""

    def __call__(self, h: mx.array, layer_idx: int) -> mx.array:
        """Return h unchanged, for every layer."""
        return h

    def __repr__(self) -> str:
        return "LogitLens()"


class TunedLens(nn.Module):
    """One affine translator per block (Belrose et al. 2023, section 3): y = W h + b, the identity before training.

    The conventions are those of mlxterp: translator i reads the OUTPUT of block i, and W is stored whole. Upstream's
    tuned-lens stores W - I, reads the input of block i, and has no translator for the last block;
    `metalens.compat.tuned_lens` reads and writes its files.

    Attributes:
        num_layers: L, blocks of the model, with or without a translator.
        hidden_dim: D, width of the model's residual stream.
        rank: rank of low-rank translators; None for the other variants.
        bias_only: whether the translators are y = h + b.
        translators: L modules, one per block. A full lens has `nn.Linear(D, D)` in float32; for the variants see
            `metalens.lenses.translators`. All have `weight` and `bias` to read.
        provenance: the model, the training and the text of the lens, saved with it: see
            `metalens.lenses.provenance.provenance_of`. {} = unknown.
        embedding_translator: translator of the embedding's output, the input of block 0, of the same variant. None = the lens has
            none, and leaves that output as it is. tuned-lens's lenses have one, as their layer 0.
    """

    provenance: dict[str, Any]
    embedding_translator: nn.Linear | Translator | None

    def __init__(
        self,
        num_layers: int,
        hidden_dim: int,
        *,
        rank: int | None = None,
        bias_only: bool = False,
        layers: Iterable[int] | None = None,
        embedding: bool = False,
        seed: int = 0,
    ) -> None:
        """Make a lens that is the identity.

        Args:
            num_layers: L, blocks of the model.
            hidden_dim: D, width of its residual stream.
            rank: rank r of translators y = h + B (A h) + b with A [r, D] and B [D, r], in place of W [D, D].
            bias_only: use translators y = h + b.
            layers: blocks that get a translator; the lens leaves the output of the others unchanged. None = all.
            embedding: also make a translator for the embedding's output.
            seed: seed of the random A of low-rank translators.

        Raises:
            InvalidValueError: if a size or rank is out of range, or a layer is not in the model.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        if num_layers < 1 or hidden_dim < 1:
            raise InvalidValueError(f"A lens needs at least one layer and one dimension, not num_layers={num_layers}, hidden_dim={hidden_dim}.")
        if rank is not None and (bias_only or not 1 <= rank <= hidden_dim):
            raise InvalidValueError(
                f"rank must be from 1 to {hidden_dim}, the width, and excludes bias_only; got rank={rank}, bias_only={bias_only}."
            )
        chosen = range(num_layers) if layers is None else set(layers)
        if not all(0 <= layer < num_layers for layer in chosen):
            raise InvalidValueError(f"layers must be from 0 to {num_layers - 1}, got {sorted(chosen)}.")
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.rank = rank
        self.bias_only = bias_only
        self.provenance = {}

        def translator(key: int) -> nn.Linear | Translator:
            if rank is not None:
                return LowRankTranslator(hidden_dim, rank, mx.random.key(key))
            return BiasTranslator(hidden_dim) if bias_only else identity_linear(hidden_dim)

        self.translators = [translator(seed * num_layers + i) if i in chosen else NoTranslator(hidden_dim) for i in range(num_layers)]
        self.embedding_translator = translator(EMBEDDING_KEY + seed) if embedding else None

    def __setattr__(self, key: str, value: Any) -> None:
        # nn.Module makes every dict and tuple a part of the parameters.
        if key in ("provenance", "origin", "embedding"):  # the last two are properties
            object.__setattr__(self, key, value)
        else:
            super().__setattr__(key, value)

    @property
    def origin(self) -> dict[str, Any]:
        """Return `provenance`. Deprecated."""
        warnings.warn(_RENAMED, DeprecationWarning, stacklevel=2)
        return self.provenance

    @origin.setter
    def origin(self, value: dict[str, Any]) -> None:
        warnings.warn(_RENAMED, DeprecationWarning, stacklevel=3)
        self.provenance = value

    @property
    def embedding(self) -> tuple[mx.array, mx.array] | None:
        """Return (A [D, D], b [D]) of `embedding_translator`, y = h + A h + b. Deprecated."""
        warnings.warn(_EMBEDDING_RENAMED, DeprecationWarning, stacklevel=2)
        if self.embedding_translator is None:
            return None
        weight, bias = self.dense(EMBEDDING)
        return weight - mx.eye(self.hidden_dim), bias

    @embedding.setter
    def embedding(self, value: tuple[mx.array, mx.array] | None) -> None:
        warnings.warn(_EMBEDDING_RENAMED, DeprecationWarning, stacklevel=3)
        if value is not None and self.variant != "full":
            raise InvalidValueError(
                f"A lens of the variant {self.variant!r} can't store the whole matrix A of its embedding: set that of its to_full(), "
                "or set embedding_translator to a translator of this variant."
            )
        self.embedding_translator = None
        if value is not None:
            self.embedding_translator = identity_linear(self.hidden_dim)
            self.embedding_translator.update({"weight": value[0] + mx.eye(self.hidden_dim), "bias": value[1]})

    @property
    def variant(self) -> str:
        """Return 'full', 'low-rank' or 'bias'."""
        return "bias" if self.bias_only else "full" if self.rank is None else "low-rank"

    @property
    def layers(self) -> list[int]:
        """Return the indices of the blocks that have a translator, in rising order: at most `num_layers` of them."""
        return [i for i, translator in enumerate(self.translators) if not isinstance(translator, NoTranslator)]

    @property
    def translated(self) -> list[Layer]:
        """Return all layers that have a translator: 'embedding' first, if it has one, then `layers`."""
        blocks: list[Layer] = [*self.layers]
        return blocks if self.embedding_translator is None else [EMBEDDING, *blocks]

    def __len__(self) -> int:
        """Return L, the number of blocks."""
        return self.num_layers

    def __iter__(self) -> Iterator[nn.Linear | Translator]:
        """Iterate over the translators of the blocks, from block 0 on."""
        return iter(self.translators)

    def __getitem__(self, key: Any) -> Any:
        """Return the translator of a block by its number, negative from the end, or a list of them for a slice; for a name, what nn.Module has."""
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, int) and not -self.num_layers <= key < self.num_layers:
            raise IndexError(f"The lens has no layer {key}: its layers are 0 to {self.num_layers - 1}.")
        return self.translators[key]

    def __call__(self, h: mx.array, layer_idx: Layer) -> mx.array:
        """Translate the output of block `layer_idx`, or of the embedding.

        Args:
            h: [..., D], any float type.
            layer_idx: 0 <= layer_idx < num_layers, or 'embedding'.

        Returns:
            [..., D] float32.

        Raises:
            InvalidValueError: if the lens does not have this layer or this width.
        """
        return translate(parameters_of(self.translator(layer_idx, h.shape[-1] if h.ndim else 0)), h)

    def translator(self, layer_idx: Layer, width: int) -> nn.Linear | Translator:
        """Return the translator of block `layer_idx`, or of the embedding, with `weight` [D, D] and `bias` [D], after a check of the width.

        Raises:
            InvalidValueError: if the lens does not have this layer or this width.
        """
        if layer_idx != EMBEDDING and _index(layer_idx) not in range(self.num_layers):
            raise InvalidValueError(f"layer_idx {layer_idx} out of range [0, {self.num_layers})")
        if width != self.hidden_dim:
            raise InvalidValueError(f"The lens translates vectors of width {self.hidden_dim}, not {width}. It belongs to another model.")
        return self.translator_of(layer_idx)

    def translator_of(self, layer: Layer) -> nn.Linear | Translator:
        """Return the translator of a layer that the lens has. A lens without one for the embedding has there the identity."""
        if layer != EMBEDDING:
            return self.translators[layer]
        return NoTranslator(self.hidden_dim) if self.embedding_translator is None else self.embedding_translator

    def dense(self, layer_idx: Layer) -> tuple[mx.array, mx.array]:
        """Return (W [D, D], b [D]) of y = W h + b for block `layer_idx`, or for the embedding, for every variant. Lazy."""
        return dense(parameters_of(self.translator(layer_idx, self.hidden_dim)), self.hidden_dim)

    def to_full(self) -> TunedLens:
        """Return the same lens with every W stored whole, which mlxterp can load. The provenance and the embedding are copied."""
        full = TunedLens(self.num_layers, self.hidden_dim, embedding=self.embedding_translator is not None)
        for layer in full.translated:
            full.translator_of(layer).update(dict(zip(("weight", "bias"), self.dense(layer), strict=True)))
        full.provenance = dict(self.provenance)
        return full

    def check_fits(self, num_layers: int, hidden_dim: int) -> None:
        """Check that the lens was made for a model with this number of blocks and this width.

        Raises:
            InvalidValueError: if it was made for another size.
        """
        if (self.num_layers, self.hidden_dim) != (num_layers, hidden_dim):
            raise InvalidValueError(
                f"This lens has {self.num_layers} layers of width {self.hidden_dim}; the model has {num_layers} of width {hidden_dim}. "
                "It was trained for another model: train one for this model, or load the model it belongs to."
            )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write `<path>.npz` (translators_<i>_weight [D, D], translators_<i>_bias [D], float32) and `<path>.json` (num_layers, hidden_dim).

        A name that ends in .npz or .json means the same pair; other dots stay part of the name. Missing folders are
        created. Each file appears whole or not at all. mlxterp reads both files of a full lens. A variant stores the
        arrays of `lenses.translators.VARIANTS`, and its .json file names the variant and the layers. The .json file
        also holds the provenance, and the SHA-256 of the .npz file.

        Args:
            path: path of the pair.
            force: replace files of these names that are not a lens.

        Raises:
            InvalidValueError: if an array holds NaN or infinity, if a translator is of another variant than the lens, if JSON
                cannot hold the provenance, or if a file of this name is not a lens. Nothing is written then.
            OSError: if a file cannot be written.
        """
        require_replaceable(lens_outputs(path), force=force)
        layers = self.layers
        chosen = None if len(layers) == self.num_layers else layers
        described = LensDescription(self.num_layers, self.hidden_dim, self.variant, self.rank, chosen, self.provenance)
        embedding = None if self.embedding_translator is None else self._stored(EMBEDDING)
        write_lens(path, LensData(described, {i: self._stored(i) for i in layers}, embedding))

    def _stored(self, layer: Layer) -> dict[str, mx.array]:
        """Return the arrays of a translator that the file holds (InvalidValueError if it has others than those of the lens's variant)."""
        found, parts = parameters_of(self.translator_of(layer)), VARIANTS[self.variant]
        name = "the embedding" if layer == EMBEDDING else f"layer {layer}"
        if found.keys() != set(parts):
            raise InvalidValueError(
                f"The translator of {name} holds {', '.join(found)}, and a lens of the variant {self.variant!r} stores "
                f"{', '.join(parts)}. Nothing is written. Save the lens's to_full(), which stores every translator whole."
            )
        return {part: found[part] for part in parts}

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read a lens that this class, mlxterp or tuned-lens saved.

        Args:
            path: the pair NAME.npz and NAME.json, with or without a suffix; a folder of tuned-lens, with params.pt and config.json; a
                snapshot_<step>.pth of its training; or 'hf:' and the id of a lens of tuned-lens's collection on the Hugging Face hub.

        Raises:
            FileNotFoundError: if there is no lens at the path, or one of its two files is missing, or the hub has no such lens.
            InvalidValueError: if the files are damaged, are not a lens, disagree, or hold NaN or infinity.
        """
        return cls.from_data(read_lens_at(path))

    @classmethod
    def from_data(cls, stored: LensData) -> TunedLens:
        """Return the lens that files hold. Warn if a variant has the whole matrix of its embedding, as before version 3: return a full lens then."""
        described, embedding = stored.description, stored.embedding
        kind: dict[str, Any] = {"rank": described.rank, "bias_only": described.variant == "bias", "layers": described.layers}
        lens = cls(described.num_layers, described.hidden_dim, embedding=embedding is not None, **kind)
        _set(lens, stored.translators)
        if embedding is not None and embedding.keys() != set(VARIANTS[described.variant]):
            warn_caller(
                f"This lens of the variant {described.variant!r} has the whole matrix of its embedding, as older versions wrote it. "
                "It is read as a full lens, and stored as one when you save it."
            )
            lens = lens.to_full()
        _set(lens, {} if embedding is None else {EMBEDDING: embedding})
        lens.provenance = described.provenance
        return lens


def _set(lens: TunedLens, parameters: Mapping[Any, Mapping[str, mx.array]]) -> None:
    """Give translators of a lens their parameters, by layer."""
    for layer, of_layer in parameters.items():
        for name, array in of_layer.items():
            setattr(lens.translator_of(layer), name, array)


def _index(layer: Any) -> int | None:
    """Return the number of a layer as Python's whole number: NumPy has others. None = it is no whole number."""
    try:
        return operator.index(layer)
    except TypeError:
        return None


def as_lens(lens: Lens | str | Path | None) -> Lens:
    """Return a lens that was given as itself, as the path of its files, or as None for the logit lens.

    Raises:
        FileNotFoundError, InvalidValueError: as `TunedLens.load`.
    """
    if lens is None:
        return LogitLens()
    return TunedLens.load(lens) if isinstance(lens, (str, Path)) else lens


def lens_kind(lens: Lens) -> str:
    """Return a lens's name in a sentence: 'logit lens', 'tuned lens', or the name of a function.

    One that was trained to predict another token than the next one says so: 'tuned lens, token shift 2'.
    """
    if isinstance(lens, LogitLens):
        return "logit lens"
    if not isinstance(lens, TunedLens):
        return str(getattr(lens, "__name__", type(lens).__name__))
    shift = token_shift_of(lens)
    return "tuned lens" if shift == 1 else f"tuned lens, token shift {shift}"


def token_shift_of(lens: Lens | None) -> int:
    """Return the positions from a prediction of a lens to the token that it was trained to predict, as its provenance tells: 1 = the next token.

    A training with the loss ce compares the prediction at position t with the token at t + token_shift; one with the loss kl with the model's
    prediction at t + token_shift, which is about the token after that.
    """
    training = lens.provenance.get("training") if isinstance(lens, TunedLens) else None
    shift = training.get("token_shift") if isinstance(training, dict) else None
    if not isinstance(training, dict) or not isinstance(shift, int):
        return 1
    return shift if training.get("loss") == "ce" else shift + 1


def untranslated_layers(lens: Lens, layers: Iterable[Layer] | None = None) -> tuple[Layer, ...]:
    """Return those of some layers that a lens reads as the logit lens does, because it has no translator for them.

    A tuned lens says which layers it translates. Of a function it is known that it reads blocks, and not the embedding. () for the logit lens.

    Args:
        lens: the lens.
        layers: the layers. None = the blocks of a tuned lens.
    """
    if isinstance(lens, TunedLens):
        translated = set(lens.translated)
        return tuple(layer for layer in (range(lens.num_layers) if layers is None else layers) if layer not in translated)
    return () if isinstance(lens, LogitLens) else tuple(layer for layer in layers or () if layer == EMBEDDING)
