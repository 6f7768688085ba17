"""A lens that one process has read from its disk, in the other processes of a group."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.layers import EMBEDDING
from metalens.training.distributed import Group


def shared_lens(path: str | Path, group: Group, whole: bool = True) -> TunedLens:
    """Read a lens in the first process, and send it to the others, which may have no disk in common with it. All processes must make this call.

    Args:
        path: path or name of the lens, as in `TunedLens.load`.
        group: the processes.
        whole: send all layers. False = keep in the others only their own layers, `group.layers_of`; the rest is the identity.

    Raises:
        FileNotFoundError, InvalidValueError: as `TunedLens.load`. The other processes get the error of the first as an InvalidValueError.
    """
    lens = None
    with group.together():
        if group.writes:
            lens = TunedLens.load(path)
    if group.size == 1 and lens is not None:
        return lens
    facts = None
    if lens is not None:
        names = ("num_layers", "hidden_dim", "rank", "bias_only")
        options = {name: getattr(lens, name) for name in names} | {"layers": list(lens.layers), "embedding": lens.embedding_translator is not None}
        facts = [options, lens.provenance]
    options, provenance = group.gather_json(facts)[0]
    found = lens or TunedLens(**options)
    found.provenance = provenance
    own = {EMBEDDING, *(found.layers if whole else group.layers_of(range(found.num_layers)))}
    for layer in found.translated:
        arrays = group.broadcast(parameters_of(found.translator_of(layer)) if group.writes else None)
        if not group.writes and layer in own:
            for name, value in arrays.items():
                setattr(found.translator_of(layer), name, value)
            mx.eval(parameters_of(found.translator_of(layer)))
    return found
