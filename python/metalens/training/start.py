"""The lens that a run starts from: the identity, or a trained lens whose training goes on.

A run from a lens has no warm start, which would replace the lens. Layers that the run does not train keep their translators.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalens.lenses.lens import TunedLens
from metalens.lenses.provenance import lens_hash
from metalens.lenses.translators import dense, parameters_of
from metalens.models.layers import Layer
from metalens.training.distributed import Group
from metalens.training.lens_exchange import shared_lens
from metalens.training.optimizer import Parameters
from metalens.utils.errors import InvalidTypeError, InvalidValueError

# Facts of a lens that a lens trained from it remembers of it.
REMEMBERED = ("model", "weights", "head", "recipe", "tokens")


class StartLens:
    """The lens that a run starts from, until the run has its translators. What the run remembers of it stays.

    Attributes:
        sha256: its hash.
    """

    def __init__(self, lens: TunedLens, path: str | None = None) -> None:
        """Take a lens; `path` is the path of its files, or None."""
        self._lens: TunedLens | None = lens
        self._path, self._provenance = path, lens.provenance
        self.sha256 = lens_hash(lens)

    @classmethod
    def of(cls, start: TunedLens | StartLens | None) -> StartLens | None:
        """Return a lens as a StartLens, hashed once."""
        return cls(start) if isinstance(start, TunedLens) else start

    def take(self) -> TunedLens:
        """Return the lens, and hold it no longer: it is as large as the translators in training.

        Raises:
            InvalidValueError: if it was taken before.
        """
        if self._lens is None:
            raise InvalidValueError("A run has taken this lens. Read it again for another run.")
        lens, self._lens = self._lens, None
        return lens

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a lens remembers of the one that its training started from: its hash, its path if there is one, and where it comes from."""
        facts = {"sha256": self.sha256} | ({} if self._path is None else {"path": self._path})
        return facts | {name: self._provenance[name] for name in REMEMBERED if name in self._provenance}


def lens_to_start_from(given: TunedLens | str | Path | None, group: Group) -> StartLens | None:
    """Return the lens that the caller of `train` gives. The first process reads its files, and the others get the whole lens.

    Which layers a process trains follows from the settings, and these from the model, which is not loaded yet.

    Raises:
        FileNotFoundError, InvalidValueError: as `TunedLens.load`.
        InvalidTypeError: if it is neither a lens nor a path.
    """
    if given is None or isinstance(given, TunedLens):
        return StartLens.of(given)
    if not isinstance(given, (str, Path)):
        raise InvalidTypeError(f"start_from must be a TunedLens, the path of one, or None, not {type(given).__name__}.")
    return StartLens(shared_lens(given, group), str(given))


def hash_of_start(start: StartLens | None, group: Group) -> str | None:
    """Return the hash of the lens that the processes of a run start from, the same in all.

    Raises:
        InvalidValueError: if they divide the text, and start from different lenses.
    """
    hashes: list[str | None] = group.gather_json(None if start is None else start.sha256)
    if group.parallel == "data" and len(set(hashes)) > 1:
        raise InvalidValueError("The processes of this run start from different lenses. Give all of them the same lens.")
    return hashes[0]  # with divided layers, the others have a part of the lens


def require_start(start: TunedLens, fresh: TunedLens) -> None:
    """Check that a run can start from a lens.

    Args:
        start: the lens.
        fresh: the identity that the run would start from without it.

    Raises:
        InvalidValueError: if the lens has another size, or does not have the translators that the run trains.
    """
    start.check_fits(fresh.num_layers, fresh.hidden_dim)
    if fresh.variant == "full" or (start.variant, start.rank) == (fresh.variant, fresh.rank):
        return
    wanted, found = (_in_words(lens) for lens in (fresh, start))
    raise InvalidValueError(
        f"The run trains {wanted}, and the lens to start from has {found}. Train the same, or leave rank and bias_only out: full matrices can "
        "start from every lens."
    )


def _in_words(lens: TunedLens) -> str:
    return {"full": "full matrices", "low-rank": f"translators of rank {lens.rank}", "bias": "biases only"}[lens.variant]


def start_parameters(start: TunedLens | None, fresh: TunedLens, layer: Layer) -> Parameters:
    """Return the parameters that a layer begins with: those of the lens to start from, else the identity.

    `start` and `fresh` are as in `require_start`.
    """
    if start is None or layer not in start.translated:
        return parameters_of(fresh.translator_of(layer))
    parameters = parameters_of(start.translator_of(layer))
    if fresh.variant != "full":
        return dict(parameters)
    return dict(zip(("weight", "bias"), dense(parameters, start.hidden_dim), strict=True))


def kept_layers(start: TunedLens | None, trained: Sequence[Layer]) -> list[Layer]:
    """Return the layers that the lens to start from translates, and the run does not train."""
    return [] if start is None else [layer for layer in start.translated if layer not in trained]
