"""mlxterp's functions that collect hidden states, and its cache of activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metalens.compat.mlxterp.core.module_resolver import normalize_layer_key
from metalens.model import InterpretableModel
from metalens.models.submodules import named_place
from metalens.models.tokenization import TokenInput
from metalens.readings.rows import select_layers
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError

__all__ = ["ActivationCache", "batch_get_activations", "collect_activations", "get_activations"]


def get_activations(
    model: InterpretableModel,
    prompts: str | Sequence[str],
    layers: Sequence[int] | None = None,
    positions: int | Sequence[int] = -1,
) -> dict[str, mx.array]:
    """Return the output of blocks at some tokens of several prompts.

    Args:
        model: the model.
        prompts: a text, or several.
        layers: numbers of blocks, negative from the end. None = all.
        positions: the token, or several, negative from the end. They count in each prompt by itself; mlxterp counts in the longest one, so that
            its last token of a shorter prompt is padding.

    Returns:
        {"layer_3": [B, D], or [B, P, D] for P positions}.

    Raises:
        InvalidValueError: if there is no prompt or position, or if a prompt has no such token.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    wanted = [positions] if isinstance(positions, int) else list(positions)
    if not texts or not wanted:
        raise InvalidValueError("get_activations needs a prompt and a position.")
    numbers = select_layers(layers, model.num_layers)
    states = model.capture(texts)
    longest = states.hidden[0].shape[1]
    lengths = [longest] * len(texts) if states.mask is None else to_list(mx.sum(states.mask.astype(mx.int32), axis=1))
    places = [[_place(position, length) for position in wanted] for length in lengths]
    index = mx.array(places)[..., None]
    found = {f"layer_{i}": mx.take_along_axis(states.hidden[i], index, axis=1) for i in numbers}
    return {name: h[:, 0] for name, h in found.items()} if isinstance(positions, int) or len(wanted) == 1 else found


def _place(position: int, length: int) -> int:
    if not -length <= position < length:
        raise InvalidValueError(f"Position {position} is out of bounds for a prompt of {length} tokens. Valid range: [{-length}, {length - 1}].")
    return position % length


def batch_get_activations(
    model: InterpretableModel,
    prompts: Sequence[str],
    layers: Sequence[int] | None = None,
    positions: int | Sequence[int] = -1,
    batch_size: int = 8,
) -> dict[str, mx.array]:
    """Return `get_activations` of many prompts, of which `batch_size` go through the model together."""
    if batch_size < 1:
        raise InvalidValueError(f"batch_size must be at least 1, got {batch_size}.")
    parts: list[dict[str, mx.array]] = []
    for start in range(0, len(prompts), batch_size):
        parts.append(get_activations(model, prompts[start : start + batch_size], layers, positions))
        mx.eval(parts[-1])
    if not parts:
        raise InvalidValueError("batch_get_activations needs a prompt.")
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass
class ActivationCache:
    """Activations by name. A name is found with or without the leading "model." or "model.model.".

    Attributes:
        activations: {name: array}.
        metadata: {"input_shape": shape of the model's output}, or None.
    """

    activations: dict[str, mx.array] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None

    def get(self, name: str) -> mx.array | None:
        """Return an activation, None if there is none of this name."""
        wanted = normalize_layer_key(name)
        return next((value for key, value in self.activations.items() if normalize_layer_key(key) == wanted), None)

    def keys(self) -> list[str]:
        """Return all names."""
        return list(self.activations)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __len__(self) -> int:
        return len(self.activations)


def collect_activations(
    model: InterpretableModel, inputs: TokenInput | list[str], layers: Iterable[str] | None = None, normalize_keys: bool = True
) -> ActivationCache:
    """Run the model once and return its activations.

    Args:
        model: the model.
        inputs: as in `InterpretableModel.trace`.
        layers: names of blocks, or of modules in them, such as 'layers.0' and 'layers.0.mlp'. None = all.
        normalize_keys: name them without the leading "model." or "model.model.".

    Raises:
        InvalidValueError: if the model has no such block or module.
    """
    with model.trace(inputs) as trace:
        pass
    found = {name: value for name, value in trace.activations.items() if name != "__model_output__"}
    if layers is not None:
        prefix = f"model.{model.source.path}"
        places = [named_place(name, model.source.layers) for name in layers]
        wanted = {f"{prefix}.{i}.{name}" if name else f"{prefix}.{i}" for i, name in places}
        found = {name: value for name, value in found.items() if name in wanted}
    if normalize_keys:
        found = {normalize_layer_key(name): value for name, value in found.items()}
    return ActivationCache(found, {"input_shape": trace.output.shape})
