"""Where a model keeps its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from metalens.utils.errors import MetalensError

# Where models keep their blocks, in the order of the search. `{}` is one of the names below, or the name that the caller gives.
LAYER_PATHS = ("{}", "model.{}", "language_model.model.{}", "model.language_model.{}", "backbone.{}", "transformer.{}")
LAYER_NAMES = ("layers", "h", "blocks")


class LayersNotFoundError(MetalensError, AttributeError):
    """The model has no list of blocks at the paths that were searched."""


def follow(root: Any, path: str) -> Any:
    """Return the attribute at a dotted path (a number indexes a list), or None if there is none."""
    for name in path.split("."):
        if name.isdigit() and isinstance(root, (list, tuple)):
            root = root[int(name)] if int(name) < len(root) else None
        else:
            root = getattr(root, name, None)
        if root is None:
            return None
    return root


def find_layers(model: Any, layer_attr: str = LAYER_NAMES[0]) -> tuple[str, Sequence[nn.Module]]:
    """Find the model's blocks.

    Args:
        model: the language model.
        layer_attr: the name or dotted path of the list of blocks. For the default name, the other usual names are searched too.

    Returns:
        (dotted path, list of blocks)

    Raises:
        LayersNotFoundError: if there is no such list. The error names the paths that were searched.
    """
    names = dict.fromkeys((layer_attr, *LAYER_NAMES))
    paths = [pattern.format(name) for name in names for pattern in LAYER_PATHS]
    searched = paths if layer_attr == LAYER_NAMES[0] else paths[: len(LAYER_PATHS)]
    for path in searched:
        layers = follow(model, path)
        if isinstance(layers, (list, tuple)) and layers:
            # mlx-lm's models offer `layers` as a property. The deepest path to the same blocks is the one that other tools show.
            aliases = [alias for alias in paths if _same_modules(follow(model, alias), layers)]
            return max(aliases, key=lambda alias: alias.count(".")), layers
    raise LayersNotFoundError(f"Could not find layers attribute. Tried: {searched}. Specify the correct path with layer_attr parameter.")


def _same_modules(a: Any, b: Sequence[nn.Module]) -> bool:
    """Return whether `a` is a list of the same modules as `b`. A property may build a new list each time."""
    return isinstance(a, (list, tuple)) and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
