"""Load a model and its tokenizer from files, with mlx-lm."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.nn as nn

from metalens.models.bundled import path_of
from metalens.utils.errors import InvalidValueError


def load(name: str) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        name: a local path, a hub id, or 'demo' for the bundled model.

    Returns:
        (model, tokenizer)

    Raises:
        InvalidValueError: if mlx-lm cannot open it.
    """
    from mlx_lm import load  # slow to import, and not needed for a model that is already in memory

    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(f"The name of the model {name!r} is not UTF-8, and MLX opens no such file. Rename the folder.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # False: by default transformers asks on a terminal whether to run the code of a tokenizer.
            loaded = load(path_of(name), tokenizer_config={"trust_remote_code": False})
    except Exception as error:
        raise InvalidValueError(
            f"Could not load model '{name}'.\nTried the following strategies:\n  1. mlx-lm failed to load model: {error}\n\n"
            "Alternatively, load the model manually and pass it to InterpretableModel(model)."
        ) from error
    return loaded[0], loaded[1]
