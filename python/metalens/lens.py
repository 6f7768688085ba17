"""Lenses: what is done to a block's output before it is unembedded. LogitLens does nothing; TunedLens applies a trained affine map per block."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.files import atomic_write
from metalens.ops import Weight, linear

# How a lens is applied: (hidden [..., D], layer) -> [..., D]. TunedLens and LogitLens are such callables, and so is any function of the kind.
Lens = Callable[[mx.array, int], mx.array]


class LogitLens:
    """The identity: decode the residual stream as if the last block had already run (nostalgebraist 2020)."""

    def __call__(self, h: mx.array, layer_idx: int) -> mx.array:
        """H as it is, whatever the layer."""
        return h


class TunedLens(nn.Module):
    """One affine translator per block (Belrose et al. 2023, section 3): y = W h + b, the identity at the start.

    Conventions of mlxterp: translator i reads the OUTPUT of block i, and W is stored whole (upstream's tuned-lens stores W - I, reads the input of
    block i, and has no translator for the last block).

    Args:
        num_layers: L, blocks of the model.
        hidden_dim: D, width of its residual stream.

    Attributes:
        translators: L layers `nn.Linear(D, D)`, float32.
    """

    def __init__(self, num_layers: int, hidden_dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if num_layers < 1 or hidden_dim < 1:
            raise ValueError(f"A lens needs at least one layer and one dimension, not num_layers={num_layers}, hidden_dim={hidden_dim}.")
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.translators = [nn.Linear(hidden_dim, hidden_dim) for _ in range(num_layers)]
        for translator in self.translators:
            translator.weight = mx.eye(hidden_dim)
            translator.bias = mx.zeros((hidden_dim,))

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
        translator = self.translator(layer_idx, h.shape[-1] if h.ndim else 0)
        return linear(h.astype(mx.float32), Weight(translator.weight)) + translator.bias

    def translator(self, layer_idx: int, width: int) -> nn.Linear:
        """The translator of block `layer_idx`, for vectors of this width.

        Raises:
            ValueError: for a layer or a width that the lens does not have.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise ValueError(f"layer_idx {layer_idx} out of range [0, {self.num_layers})")
        if width != self.hidden_dim:
            raise ValueError(f"The lens translates vectors of width {self.hidden_dim}, not {width}. It belongs to another model.")
        return self.translators[layer_idx]

    def check_fits(self, num_layers: int, hidden_dim: int) -> None:
        """Raise ValueError unless the lens was made for a model of this many blocks and this width."""
        if (self.num_layers, self.hidden_dim) != (num_layers, hidden_dim):
            raise ValueError(
                f"This lens has {self.num_layers} layers of width {self.hidden_dim}; the model has {num_layers} of width {hidden_dim}. "
                "It was trained for another model: train one for this model, or load the model it belongs to."
            )

    def save(self, path: str | Path) -> None:
        """Write `<path>.npz` (translators_<i>_weight [D, D], translators_<i>_bias [D], float32) and `<path>.json` (num_layers, hidden_dim).

        A name that ends in .npz or .json means the same pair; other dots stay part of the name. Missing folders are created. Each file appears
        whole or not at all. mlxterp reads both.
        """
        weights, config = lens_files(path)
        weights.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {}
        for i, translator in enumerate(self.translators):
            arrays[f"translators_{i}_weight"] = np.array(translator.weight.astype(mx.float32))
            arrays[f"translators_{i}_bias"] = np.array(translator.bias.astype(mx.float32))
        with atomic_write(weights) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)
        with atomic_write(config) as temporary:
            temporary.write_text(json.dumps({"num_layers": self.num_layers, "hidden_dim": self.hidden_dim}, indent=2) + "\n")

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
        num_layers, hidden_dim = _read_config(config)
        stored = _read_arrays(weights)
        expected = {f"translators_{i}_{part}" for i in range(min(num_layers, len(stored) + 1)) for part in ("weight", "bias")}
        for names, verb in ((expected - set(stored), "it holds no"), (set(stored) - expected, "it also holds")):
            if names:
                raise ValueError(f"{weights} is not a lens of {num_layers} layers, as {config.name} says: {verb} {', '.join(sorted(names)[:4])}.")
        lens = cls(num_layers, hidden_dim)
        for i, translator in enumerate(lens.translators):
            for part, shape in (("weight", (lens.hidden_dim, lens.hidden_dim)), ("bias", (lens.hidden_dim,))):
                name = f"translators_{i}_{part}"
                array = stored[name]
                if array.shape != shape or array.dtype.kind not in "fiu":
                    raise ValueError(
                        f"{weights}: {name} has shape {array.shape} and type {array.dtype}; {config.name} says numbers of shape {shape}."
                    )
                with np.errstate(over="ignore"):
                    array = array.astype(np.float32)
                if not np.isfinite(array).all():
                    raise ValueError(f"{weights}: {name} holds NaN or infinity. The lens was spoilt in training; train it again.")
                setattr(translator, part, mx.array(array))
        return lens


def lens_files(path: str | Path) -> tuple[Path, Path]:
    """The (.npz, .json) pair that a lens path names. Only these two suffixes are taken off: 'Llama-3.2-1B' keeps its dot."""
    path = Path(path)
    stem = path.name[: -len(path.suffix)] if path.suffix in {".npz", ".json"} else path.name
    if not stem:
        raise ValueError(f"{str(path)!r} names no lens file.")
    return path.with_name(stem + ".npz"), path.with_name(stem + ".json")


def _read_config(file: Path) -> tuple[int, int]:
    try:
        config: Any = json.loads(file.read_text())
        return int(config["num_layers"]), int(config["hidden_dim"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} does not describe a lens: expected JSON with num_layers and hidden_dim ({error!r}).") from error


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged or no .npz archive ({error}). Copy it again, or train the lens again.") from error
