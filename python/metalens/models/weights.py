"""Notice that the weights of a model are others than before: arrays that were replaced, and a hash that tells two models apart."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Numbers of each array that the hash reads, at equal distances: training changes nearly all of an array, so these tell.
SAMPLE = 64


def _named(module: nn.Module) -> list[tuple[str, mx.array]]:
    found: list[tuple[str, Any]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return [(name, array) for name, array in found if isinstance(array, mx.array)]


def arrays_of(part: Any) -> list[mx.array]:
    """Return the arrays of a module, or an array as a list; [] for anything else, such as a function."""
    if isinstance(part, nn.Module):
        return [array for _, array in _named(part)]
    return [part] if isinstance(part, mx.array) else []


class Snapshot:
    """Remembers which arrays there were, without keeping them in memory.

    Optimizers, quantization, adapters and `load_weights` put new arrays into a model. A change of an array in place is not noticed.

    Args:
        arrays: the arrays.
    """

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self._arrays = [weakref.ref(array) for array in arrays]

    def matches(self, arrays: Sequence[mx.array]) -> bool:
        """Return whether these are the same arrays, in the same order."""
        return len(arrays) == len(self._arrays) and all(ref() is array for ref, array in zip(self._arrays, arrays, strict=True))


def weights_hash(model: nn.Module) -> str:
    """Return 'sha256:...' of a model as it is stored: names, shapes and types of all arrays, and SAMPLE numbers of each.

    Equal models give equal hashes on every machine, accelerated or not. A fine-tuned model gives another hash, even if its head stayed the same.

    Cost: a few milliseconds; SAMPLE numbers of each array are read.
    """
    named = sorted(_named(model), key=itemgetter(0))
    samples = []
    for _, array in named:
        flat = array.reshape(-1)
        samples.append(mx.contiguous(flat[:: max(1, flat.size // SAMPLE)]))
    mx.eval(samples)
    digest = hashlib.sha256()
    for (name, array), sample in zip(named, samples, strict=True):
        digest.update(json.dumps([name, list(array.shape), str(array.dtype)]).encode())
        digest.update(np.array(sample.view(mx.uint8)).tobytes() if sample.size else b"")
    return f"sha256:{digest.hexdigest()}"
