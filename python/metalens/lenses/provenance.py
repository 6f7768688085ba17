"""Where a lens comes from: the model, the training and the text that it remembers, and whether it fits the model that it is used on."""

from __future__ import annotations

import hashlib
import json
import warnings
import weakref
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, TunedLens
from metalens.models.language_model import LanguageModel
from metalens.models.unembed import Unembed
from metalens.ops import Head
from metalens.utils.errors import InvalidTypeError

_hashes: weakref.WeakKeyDictionary[Unembed, str] = weakref.WeakKeyDictionary()


def head_hash(head: Head) -> str:
    """'sha256:...' of the head as it is stored: packed values, scales, biases, bias, their formats, and what is done to the logits.

    All of it is read, about a second per GB, a piece at a time: the same weights give the same hash on every machine, and a model that was
    fine-tuned or quantized otherwise gives another.
    """
    w = head.weight
    digest = hashlib.sha256()
    quantized = None if w.scales is None else (w.group_size, w.bits, w.mode)
    digest.update(json.dumps([quantized, head.scale, head.softcap, head.used_rows]).encode())
    for name, array in (("values", w.values), ("scales", w.scales), ("biases", w.biases), ("bias", head.bias)):
        if array is not None:
            digest.update(json.dumps([name, list(array.shape), str(array.dtype)]).encode())
            flat = array.reshape(-1)
            for start in range(0, flat.size, 1 << 24):
                digest.update(np.array(flat[start : start + (1 << 24)].view(mx.uint8)).data)
    return f"sha256:{digest.hexdigest()}"


def _hash_of(unembed: Unembed) -> str:
    if unembed not in _hashes:
        _hashes[unembed] = head_hash(unembed.head)
    return _hashes[unembed]


def _format_of(head: Head) -> str:
    w = head.weight
    return str(w.values.dtype).removeprefix("mlx.core.") if w.scales is None else f"{w.mode} {w.bits}-bit, groups of {w.group_size}"


def origin_of(
    unembed: Unembed,
    model: str | None = None,
    *,
    revision: str | None = None,
    tokens: int | None = None,
    recipe: str | None = None,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a lens should remember of its model and its training: for `lens.origin`.

    Args:
        unembed: the model's norm and head.
        model: path or hub id.
        revision: of the hub's repository.
        tokens: seen in training.
        recipe: its name.
        training: the settings, as JSON has them.

    Returns:
        {"metalens": version, "head": `head_hash`, "quantization": of the head, ...}, and of the arguments those that are not None.
    """
    facts = {"model": model, "revision": revision, "tokens": tokens, "recipe": recipe, "training": training}
    about = {"metalens": version("metalens"), "head": _hash_of(unembed), "quantization": _format_of(unembed.head)}
    return about | {key: value for key, value in facts.items() if value is not None}


def check_origin(lens: TunedLens, unembed: Unembed, model: str | None = None, stacklevel: int = 2) -> None:
    """Warn (UserWarning) if the lens remembers another model than the one that it is used on.

    Another head is another model. Where the lens knows no head (tuned-lens's files do not), another name is: of a path or hub id the last part.

    Args:
        lens: with or without an origin.
        unembed: of the model that it is used on.
        model: its path or hub id, if known.
        stacklevel: as in `warnings.warn`, for this function's caller 2.
    """
    known, name = lens.origin.get("head"), lens.origin.get("model")
    differs = []
    if isinstance(name, str) and model is not None and _last_part(name) != _last_part(model):
        differs.append(f"it was trained for {name!r}, and this is {model!r}")
    if known is not None:
        if known == _hash_of(unembed):
            return
        before, now = lens.origin.get("quantization"), _format_of(unembed.head)
        same_format = before is None or before == now
        differs.append("the weights of the output head differ" if same_format else f"its model's head was {before}, and this one is {now}")
    if differs:
        warnings.warn(
            f"The lens remembers another model: {'; '.join(differs)}; "
            "its readings may be off, so measure it on this model with evaluate(), or train one for it.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def check_lens(lens: Lens, model: LanguageModel, stacklevel: int = 2) -> None:
    """Check that a lens can be used on a model. Warn if a `TunedLens` remembers another model. Accept other functions as they are.

    Raises:
        InvalidValueError: if a `TunedLens` has another number of layers or another width.
        InvalidTypeError: if it is no function.
    """
    if isinstance(lens, TunedLens):
        lens.check_fits(model.num_layers, model.unembed.hidden_dim)
        check_origin(lens, model.unembed, model.name, stacklevel=stacklevel + 1)
    elif not callable(lens):
        raise InvalidTypeError(f"A lens is a TunedLens or a function (hidden, layer) -> hidden, not {type(lens).__name__}.")
