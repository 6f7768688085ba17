"""Load a model and its tokenizer from files, with mlx-lm."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import mlx.nn as nn

from metalens.models import bundled
from metalens.models.registry import PACKAGED, path_of
from metalens.models.sharding import Processes, Sharding
from metalens.models.tensor_parallel import load_sharded
from metalens.utils.errors import InvalidValueError, MetalensError

T = TypeVar("T")

HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"


def load(name: str) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        name: a folder in mlx-lm's format, a GGUF file, a hub id, 'demo' for the bundled model, or a name in
            `metalens.models.registry.PACKAGED`.

    Returns:
        (model, tokenizer)

    Raises:
        InvalidValueError: if mlx-lm cannot open it.
        OSError, UnavailableError, MissingPackageError: as `metalens.models.registry.path_of`.
    """
    return _opened(name, _load_whole)


def load_part(name: str, tensor_group: Processes) -> tuple[nn.Module, Any, Sharding]:
    """Load this process's part of a model, and the tokenizer. All processes of the group must make the same call.

    Args:
        name: as in `load`.
        tensor_group: the processes, at least two.

    Returns:
        (model, tokenizer, how the model is divided)

    Raises:
        InvalidValueError: as `load`; also if mlx-lm cannot divide the model as asked, or the processes have different files.
        UnavailableError: if another process has ended.
    """
    return _opened(name, lambda path: load_sharded(path, tensor_group), tensor_group.together())


def _load_whole(path: str) -> tuple[nn.Module, Any]:
    from mlx_lm import load  # slow to import, and not needed for a model that is already in memory

    # False: by default transformers asks on a terminal whether to run the code of a tokenizer.
    loaded = load(path, tokenizer_config={"trust_remote_code": False})
    return loaded[0], loaded[1]


def _opened(name: str, load: Callable[[str], T], together: AbstractContextManager[None] | None = None) -> T:
    """Return what a function loads from the path of a model, with errors that say what was tried. The path is looked for inside `together`."""
    with together or nullcontext():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError(f"The name of the model {name!r} is not UTF-8, and MLX opens no such file. Rename the folder.") from error
        path = path_of(name, make=True)
        missing = _what_is_wrong(Path(path))
        if missing and (Path(path).exists() or not re.fullmatch(HUB_ID, path)):
            raise InvalidValueError(f"Could not load model '{name}'.\n{missing}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(path)
    except MetalensError:
        raise
    except Exception as error:
        hub = f"{missing} The hub was asked for a model of that name:\n" if missing else ""
        raise InvalidValueError(
            f"Could not load model '{name}'.\n{hub}Tried the following strategies:\n  1. mlx-lm failed to load model: {error}\n\n"
            "Alternatively, load the model manually and pass it to InterpretableModel(model)."
        ) from error


def _what_is_wrong(path: Path) -> str:
    """Return why a path cannot be a model's folder; "" if it can."""
    if path.is_file():
        return f"{path} is a file. A model is a folder in mlx-lm's format, a GGUF file, or a hub id."
    if path.is_dir():
        if (path / "config.json").exists():
            return ""
        if ggufs := sorted(path.glob("*.gguf")):
            return f"{path} has no config.json, but a GGUF file. Give the path of that file: {ggufs[0]}"
        inside = sorted(path.glob("*/config.json"))
        return f"{path} has no config.json, so it is not the folder of a model.{f' Did you mean {inside[0].parent}?' if inside else ''}"
    try:
        beside = [str(found.relative_to(path.parent)) for found in path.parent.iterdir() if found.is_dir() or found.suffix == ".gguf"]
    except OSError:
        beside = []
    known = [*PACKAGED, bundled.NAME] if str(path.parent) == "." else []
    close = difflib.get_close_matches(path.name, [*beside, *known], 1, 0.75)
    hint = f" Did you mean {path.parent / close[0]}?" if close else ""
    return f"There is no folder {path}.{hint}"
