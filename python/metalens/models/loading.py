"""A model and its tokenizer from files, by mlx-lm."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.nn as nn

from metalens.models.bundled import path_of
from metalens.utils.errors import InvalidValueError


def load(name: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer from a local path, a hub id, or 'demo' (ValueError if mlx-lm can't open it).

    Args:
        name: the path or id.
    """
    from mlx_lm import load  # slow to import, and needless for a model that is already loaded

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load(path_of(name))
    except Exception as error:
        raise InvalidValueError(
            f"Could not load model '{name}'.\nTried the following strategies:\n  1. mlx-lm failed to load model: {error}\n\n"
            "Alternatively, load the model manually and pass it to InterpretableModel(model)."
        ) from error
    return loaded[0], loaded[1]
