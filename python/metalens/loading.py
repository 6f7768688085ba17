"""A model and its tokenizer from files, by mlx-lm."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.nn as nn


def load(name: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer from a local path or hub id (ValueError if mlx-lm can't open it).

    Args:
        name: the path or id.
    """
    from mlx_lm import load  # slow to import, and needless for a model that is already loaded

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load(name)
    except Exception as error:
        raise ValueError(
            f"Could not load model '{name}'.\nTried the following strategies:\n  1. mlx-lm failed to load model: {error}\n\n"
            "Alternatively, load the model manually and pass it to InterpretableModel(model)."
        ) from error
    return loaded[0], loaded[1]
