"""Notice that the weights of a model are others than before: arrays that were replaced, and a hash that tells two models apart."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Numbers of each array that the hash reads, at equal distances: training changes nearly all of an array, so these tell.
SAMPLE = 64


def named_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return the arrays of a module with their dotted names."""
    found: list[tuple[str, Any]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return [(name, array) for name, array in found if isinstance(array, mx.array)]


def arrays_of(part: Any) -> list[mx.array]:
    """Return the arrays of a module, or an array as a list; [] for anything else, such as a function."""
    if isinstance(part, nn.Module):
        return [array for _, array in named_arrays(part)]
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
    named = sorted(named_arrays(model), key=itemgetter(0))
    samples = [_sample(array) for _, array in named]
    mx.eval(samples)
    return _digest([_description(name, array) for name, array in named], [_bytes(sample) for sample in samples])


def hash_in_parts(arrays: list[tuple[str, mx.array]], rank: int, size: int, gather: Callable[[list[str]], list[list[str]]]) -> str:
    """Return the `weights_hash` of a model that is too large for one machine.

    Each process reads a part of the arrays, one at a time, so all processes together read the files once.

    Args:
        arrays: names and arrays of the whole model, which MLX has not loaded. The list is emptied, and each array goes after its turn.
        rank, size: number of this process, from 0, and number of processes.
        gather: function that returns what every process gave it, by rank.
    """
    arrays.sort(key=itemgetter(0), reverse=True)
    descriptions: list[bytes] = []
    mine: list[str] = []
    while arrays:
        name, array = arrays.pop()
        if len(descriptions) % size == rank:
            sample = _sample(array)
            mx.eval(sample)
            mine.append(_bytes(sample).hex())
        descriptions.append(_description(name, array))
        del array
    parts = gather(mine)
    return _digest(descriptions, [bytes.fromhex(parts[i % size][i // size]) for i in range(len(descriptions))])


def _sample(array: mx.array) -> mx.array:
    flat = array.reshape(-1)
    return mx.contiguous(flat[:: max(1, flat.size // SAMPLE)])


def _bytes(sample: mx.array) -> bytes:
    return np.array(sample.view(mx.uint8)).tobytes() if sample.size else b""


def _description(name: str, array: mx.array) -> bytes:
    return json.dumps([name, list(array.shape), str(array.dtype)]).encode()


def _digest(descriptions: Sequence[bytes], samples: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for description, sample in zip(descriptions, samples, strict=True):
        digest.update(description)
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"
