"""Lenses: what is done to a block's output before it is unembedded. LogitLens does nothing; TunedLens applies a trained affine map per block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.lenses.translators import (
    VARIANTS,
    BiasTranslator,
    LowRankTranslator,
    NoTranslator,
    Translator,
    dense,
    identity_linear,
    parameters_of,
    read_arrays,
    shape_of,
    translate,
)
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write

# How a lens is applied: (hidden [..., D], layer) -> [..., D]. TunedLens and LogitLens are such callables, and so is any function of the kind.
Lens = Callable[[mx.array, int], mx.array]

# Of the .json file: 1 is a full lens, which every metalens and mlxterp read, whatever else the file says; 2 knows the variants.
FORMAT_VERSION = 2
MAX_LAYERS = 10_000  # that a file may claim without having arrays for them
EMBEDDING = ("embedding_weight", "embedding_bias")


class LogitLens:
    """The identity: decode the residual stream as if the last block had already run (nostalgebraist 2020)."""

    def __call__(self, h: mx.array, layer_idx: int) -> mx.array:
        """H as it is, whatever the layer."""
        return h


class TunedLens(nn.Module):
    """One affine translator per block (Belrose et al. 2023, section 3): y = W h + b, the identity at the start.

    Conventions of mlxterp: translator i reads the OUTPUT of block i, and W is stored whole (upstream's tuned-lens stores W - I, reads the input of
    block i, and has no translator for the last block; `metalens.compat.tuned_lens` reads and writes its files).

    Args:
        num_layers: L, blocks of the model.
        hidden_dim: D, width of its residual stream.
        rank: r: translators y = h + B (A h) + b with A [r, D] and B [D, r], in place of W [D, D].
        bias_only: translators y = h + b.
        layers: the blocks that have a translator; the others are left as they are. None = all.
        seed: of the random A of low-rank translators.

    Attributes:
        translators: L layers `nn.Linear(D, D)`, float32; of a variant, see `metalens.lenses.translators`: their `weight` and `bias` can be read too.
        origin: what is known of the model and of the training, saved with the lens: see `origin_of`. {} = nothing.
        embedding: (A [D, D], b [D]) of y = h + A h + b for the embedding, which is no block's output: kept for the sake of tuned-lens's files that
            have it, and used by nothing here. None = none.
    """

    origin: dict[str, Any]
    embedding: tuple[mx.array, mx.array] | None

    def __init__(
        self,
        num_layers: int,
        hidden_dim: int,
        *,
        rank: int | None = None,
        bias_only: bool = False,
        layers: Iterable[int] | None = None,
        seed: int = 0,
    ) -> None:
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
        self.origin = {}
        self.embedding = None

        def translator(layer: int) -> nn.Linear | Translator:
            if layer not in chosen:
                return NoTranslator(hidden_dim)
            if rank is not None:
                return LowRankTranslator(hidden_dim, rank, mx.random.key(seed * num_layers + layer))
            return BiasTranslator(hidden_dim) if bias_only else identity_linear(hidden_dim)

        self.translators = [translator(layer) for layer in range(num_layers)]

    def __setattr__(self, key: str, value: Any) -> None:
        if key in ("origin", "embedding"):  # a dict or tuple would become a part of the parameters or the optimizer's state
            object.__setattr__(self, key, value)
        else:
            super().__setattr__(key, value)

    @property
    def variant(self) -> str:
        """'full', 'low-rank' or 'bias'."""
        return "bias" if self.bias_only else "full" if self.rank is None else "low-rank"

    @property
    def layers(self) -> list[int]:
        """The blocks that have a translator."""
        return [i for i, translator in enumerate(self.translators) if not isinstance(translator, NoTranslator)]

    def __call__(self, h: mx.array, layer_idx: int) -> mx.array:
        """Translate the output of block `layer_idx`.

        Args:
            h: [..., D], any float type.
            layer_idx: 0 <= layer_idx < num_layers.

        Returns:
            [..., D] float32.

        Raises:
            ValueError: for a layer or a width that the lens does not have.
        """
        return translate(parameters_of(self.translator(layer_idx, h.shape[-1] if h.ndim else 0)), h)

    def translator(self, layer_idx: int, width: int) -> nn.Linear | Translator:
        """The translator of block `layer_idx`, for vectors of this width: `weight` [D, D] and `bias` [D].

        Raises:
            ValueError: for a layer or a width that the lens does not have.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise InvalidValueError(f"layer_idx {layer_idx} out of range [0, {self.num_layers})")
        if width != self.hidden_dim:
            raise InvalidValueError(f"The lens translates vectors of width {self.hidden_dim}, not {width}. It belongs to another model.")
        return self.translators[layer_idx]

    def dense(self, layer_idx: int) -> tuple[mx.array, mx.array]:
        """(W [D, D], b [D]) of block `layer_idx`, whatever the variant: y = W h + b. Lazy."""
        return dense(parameters_of(self.translator(layer_idx, self.hidden_dim)), self.hidden_dim)

    def to_full(self) -> TunedLens:
        """The same lens with every W stored whole: what mlxterp can load. Origin and embedding come along."""
        full = TunedLens(self.num_layers, self.hidden_dim)
        for i, translator in enumerate(full.translators):
            translator["weight"], translator["bias"] = self.dense(i)
        full.origin, full.embedding = dict(self.origin), self.embedding
        return full

    def check_fits(self, num_layers: int, hidden_dim: int) -> None:
        """Raise ValueError unless the lens was made for a model of this many blocks and this width."""
        if (self.num_layers, self.hidden_dim) != (num_layers, hidden_dim):
            raise InvalidValueError(
                f"This lens has {self.num_layers} layers of width {self.hidden_dim}; the model has {num_layers} of width {hidden_dim}. "
                "It was trained for another model: train one for this model, or load the model it belongs to."
            )

    def save(self, path: str | Path) -> None:
        """Write `<path>.npz` (translators_<i>_weight [D, D], translators_<i>_bias [D], float32) and `<path>.json` (num_layers, hidden_dim).

        A name that ends in .npz or .json means the same pair; other dots stay part of the name. Missing folders are created. Each file appears
        whole or not at all. mlxterp reads both, unless the lens is a variant: then the arrays are those of `lenses.translators.VARIANTS`, and the
        .json file says which, and of which layers. It also has the origin.

        Raises:
            ValueError: if the origin can't be written as JSON.
        """
        weights, config = lens_files(path)
        text = json.dumps(_description(self), indent=2, allow_nan=False, default=_no_json) + "\n"
        weights.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {}
        for i in self.layers:
            for part in VARIANTS[self.variant]:
                arrays[f"translators_{i}_{part}"] = np.array(self.translators[i][part].astype(mx.float32))
        if self.embedding is not None:
            arrays |= {name: np.array(array.astype(mx.float32)) for name, array in zip(EMBEDDING, self.embedding, strict=True)}
        with atomic_write(weights) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)
        with atomic_write(config) as temporary:
            temporary.write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read a lens that this class or mlxterp saved.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if they are damaged, are not a lens, disagree, or hold NaN or infinity.
        """
        weights, config = lens_files(path)
        for file in (weights, config):
            if not file.is_file():
                raise FileNotFoundError(f"No lens at {path}: {file} is missing. A lens is the pair {weights.name} and {config.name}.")
        described = _read_config(config)
        arrays = read_arrays(weights, lambda stored: _expected(described, stored), f"a lens of {described.num_layers} layers, as {config.name} says")
        lens = cls(described.num_layers, described.hidden_dim, rank=described.rank, bias_only=described.variant == "bias", layers=described.layers)
        lens.origin = described.origin
        for i in lens.layers:
            for part in VARIANTS[lens.variant]:
                setattr(lens.translators[i], part, arrays[f"translators_{i}_{part}"])
        if EMBEDDING[0] in arrays:
            lens.embedding = (arrays[EMBEDDING[0]], arrays[EMBEDDING[1]])
        return lens


def lens_files(path: str | Path) -> tuple[Path, Path]:
    """The (.npz, .json) pair that a lens path names. Only these two suffixes are taken off: 'Llama-3.2-1B' keeps its dot."""
    path = Path(path)
    stem = path.name[: -len(path.suffix)] if path.suffix in {".npz", ".json"} else path.name
    if not stem:
        raise InvalidValueError(f"{str(path)!r} names no lens file.")
    return path.with_name(stem + ".npz"), path.with_name(stem + ".json")


# ------------------------------------------------------------------ what the .json file says


@dataclass(frozen=True)
class _Described:
    """A lens, as its .json file describes it."""

    num_layers: int
    hidden_dim: int
    variant: str = "full"
    rank: int | None = None
    layers: list[int] | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def _expected(described: _Described, stored: set[str]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays that a lens has; of no more layers than are stored, and one: a damaged file may claim any number."""
    d = described.hidden_dim
    expected = {
        f"translators_{i}_{part}": shape_of(part, d, described.rank)
        for i in (range(described.num_layers) if described.layers is None else described.layers)[: len(stored) + 1]
        for part in VARIANTS[described.variant]
    }
    if set(EMBEDDING) <= stored:
        expected |= {EMBEDDING[0]: (d, d), EMBEDDING[1]: (d,)}
    return expected


def _description(lens: TunedLens) -> dict[str, Any]:
    described: dict[str, Any] = {"num_layers": lens.num_layers, "hidden_dim": lens.hidden_dim}
    layers = lens.layers
    if lens.variant != "full" or len(layers) < lens.num_layers:
        described |= {"format_version": FORMAT_VERSION, "variant": lens.variant, "rank": lens.rank, "layers": layers}
    elif lens.origin or lens.embedding is not None:
        described |= {"format_version": 1}
    return described | ({"origin": lens.origin} if lens.origin else {})


def _no_json(value: Any) -> Any:
    raise InvalidValueError(f"The lens's origin holds {value!r}, which JSON has no form for. Put text, numbers, lists and dicts of them there.")


def _read_config(file: Path) -> _Described:
    try:
        config: Any = json.loads(file.read_text())
        num_layers, hidden_dim = int(config["num_layers"]), int(config["hidden_dim"])
        written = config.get("format_version", 1)
        variant, rank, layers, origin = config.get("variant", "full"), config.get("rank"), config.get("layers"), config.get("origin", {})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidValueError(f"{file} does not describe a lens: expected JSON with num_layers and hidden_dim ({error!r}).") from error
    if not isinstance(written, int) or written > FORMAT_VERSION:
        raise InvalidValueError(f"{file} has format_version {written!r}; this metalens reads up to {FORMAT_VERSION}. Read it with a newer metalens.")
    if (
        not isinstance(variant, str)
        or variant not in VARIANTS
        or (type(rank) is int) != (variant == "low-rank")
        or not (layers is None or (isinstance(layers, list) and all(type(i) is int and 0 <= i < num_layers <= MAX_LAYERS for i in layers)))
        or not isinstance(origin, dict)
    ):
        raise InvalidValueError(
            f"{file} does not describe a lens: expected a variant of {', '.join(VARIANTS)}, a rank for low-rank only, layers as a list of different "
            f"numbers, and origin as an object; found variant {variant!r}, rank {rank!r}, layers {layers!r:.200}, origin {origin!r:.200}."
        )
    return _Described(num_layers, hidden_dim, variant, rank, layers, origin)
