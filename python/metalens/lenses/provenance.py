"""Provenance: the model, the training and the text that a lens remembers, and the check that a lens fits a model."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.language_model import LanguageModel
from metalens.models.layers import Layer
from metalens.models.unembed import Unembed
from metalens.ops import Head
from metalens.utils.errors import InvalidTypeError
from metalens.utils.warn import warn_caller

_hashes: weakref.WeakKeyDictionary[Unembed, str] = weakref.WeakKeyDictionary()


def head_hash(head: Head) -> str:
    """Return 'sha256:...' of a head as it is stored.

    The hash covers the packed values, scales, biases and bias, their formats, and the scale, softcap and used rows of
    the logits. Equal weights give equal hashes on every machine. A fine-tuned model, or another quantization, gives
    another hash.

    Cost: all weights are read, a piece at a time, about one second per GB.
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


def lens_hash(lens: TunedLens) -> str:
    """Return 'sha256:...' of a lens's translators: their sizes, their variant and their numbers in float32. The provenance takes no part."""
    digest = hashlib.sha256(json.dumps([lens.num_layers, lens.hidden_dim, lens.variant, lens.rank, lens.translated]).encode())
    for layer in lens.translated:
        digest.update(translator_hash(lens, layer).encode())
    return f"sha256:{digest.hexdigest()}"


def translator_hash(lens: TunedLens, layer: Layer) -> str:
    """Return the SHA-256 of one translator of a lens: the names of its parameters and their numbers in float32."""
    digest = hashlib.sha256()
    for name, array in sorted(parameters_of(lens.translator_of(layer)).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array.astype(mx.float32)).data)
    return digest.hexdigest()


def _hash_of(unembed: Unembed) -> str:
    if unembed not in _hashes:
        _hashes[unembed] = head_hash(unembed.head)
    return _hashes[unembed]


def _format_of(head: Head) -> str:
    w = head.weight
    return str(w.values.dtype).removeprefix("mlx.core.") if w.scales is None else f"{w.mode} {w.bits}-bit, groups of {w.group_size}"


def provenance_of(
    unembed: Unembed,
    model: str | None = None,
    *,
    weights: str | None = None,
    revision: str | None = None,
    tokens: int | None = None,
    recipe: str | None = None,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the facts that a lens should remember, for `lens.provenance`.

    Args:
        unembed: norm and head of the model.
        model: path or hub id of the model.
        weights: hash of all weights of the model (`LanguageModel.weights_hash`).
        revision: revision of the hub's repository.
        tokens: number of tokens seen in training.
        recipe: name of the training recipe.
        training: settings of the training, as JSON holds them.

    Returns:
        {"metalens": version, "head": `head_hash`, "quantization": format of the head, ...}, and the arguments that are
        not None.
    """
    facts = {"weights": weights, "model": model, "revision": revision, "tokens": tokens, "recipe": recipe, "training": training}
    about = {"metalens": version("metalens"), "head": _hash_of(unembed), "quantization": _format_of(unembed.head)}
    return about | {key: value for key, value in facts.items() if value is not None}


def check_provenance(lens: TunedLens, unembed: Unembed, model: str | None = None, weights: Callable[[], str] | None = None) -> None:
    """Warn (UserWarning) if the lens remembers another model than the one it is used on.

    Models with different heads, or other weights anywhere, are different models. If the lens does not know the head
    (tuned-lens's files do not), the last part of the model's path or hub id decides. "" is no name.

    Args:
        lens: a lens, with or without a provenance.
        unembed: norm and head of the model that it is used on.
        model: path or hub id of that model, if known.
        weights: function that returns the hash of all its weights. It is called if the lens knows such a hash.
    """
    known, name = lens.provenance.get("head"), lens.provenance.get("model")
    differences = []
    if isinstance(name, str) and name and model is not None and _last_part(name) != _last_part(model):
        differences.append(f"it was trained for {name!r}, and this is {model!r}")
    if known is not None and known == _hash_of(unembed):
        theirs = lens.provenance.get("weights")
        if not isinstance(theirs, str) or weights is None or theirs == weights():
            return
        differences.append("its head is the same, but other weights differ, as after fine-tuning")
    elif known is not None:
        before, now = lens.provenance.get("quantization"), _format_of(unembed.head)
        same_format = before is None or before == now
        differences.append("the weights of the output head differ" if same_format else f"its model's head was {before}, and this one is {now}")
    if differences:
        warn_caller(
            f"The lens remembers another model: {'; '.join(differences)}; "
            "its readings may be off, so measure it on this model with evaluate(), or train one for it."
        )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def check_lens(lens: Lens, model: LanguageModel) -> None:
    """Check that a lens can be used on a model. Warn if a `TunedLens` remembers another model. Accept other functions as they are.

    Raises:
        InvalidValueError: if a `TunedLens` has another number of layers or another width.
        InvalidTypeError: if the lens is not a function.
    """
    if isinstance(lens, TunedLens):
        lens.check_fits(model.num_layers, model.unembed.hidden_dim)
        check_provenance(lens, model.unembed, model.name, lambda: model.weights_hash)
    elif not callable(lens):
        raise InvalidTypeError(f"A lens is a TunedLens or a function (hidden, layer) -> hidden, not {type(lens).__name__}.")
