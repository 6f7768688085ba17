"""A causal basis, and the file that holds it: one .npz file for each layer, written again after every direction.

vectors [k, D], energies [k], evaluations [k], converged [k], mean [D]    float64, but for the counts and the flags
about                                                                     JSON: layer, mode, tokens, settings
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metalens.analysis.ablation import AblationMode
from metalens.lenses.lens_file import archive_fault
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write
from metalens.utils.outputs import Output, require_replaceable

ARRAYS = ("vectors", "energies", "evaluations", "converged", "mean")


@dataclass(frozen=True, eq=False)
class CausalBasis:
    """Directions of the residual stream after one block, in the order in which they were found.

    Attributes:
        layer: the block.
        vectors: [k, D] orthonormal rows.
        energies: [k] mean KL(lens || lens with the direction ablated), nats per token.
        evaluations: [k] number of evaluations that the search of each direction took.
        converged: [k] whether the search rose no more. False = its limit of evaluations ended it.
        mean: [D] mean of the hidden states, which mean ablation puts in.
        mode: the kind of ablation.
        tokens: number of positions that the energies are means over.
        settings: what the directions depend on, as JSON: hashes of text, model and lens, and the settings of the search.
    """

    layer: int
    vectors: np.ndarray
    energies: np.ndarray
    evaluations: np.ndarray
    converged: np.ndarray
    mean: np.ndarray
    mode: AblationMode
    tokens: int
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Return k, the number of directions."""
        return len(self.vectors)

    def first(self, count: int) -> CausalBasis:
        """Return the basis of the first `count` directions."""
        return replace(self, **{name: getattr(self, name)[:count] for name in ARRAYS if name != "mean"})

    def to_dict(self) -> dict[str, Any]:
        """Return the basis without its vectors, as JSON: {"layer", "mode", "tokens", "energies", "evaluations", "converged"}."""
        lists = {name: getattr(self, name).tolist() for name in ("energies", "evaluations", "converged")}
        return {"layer": self.layer, "mode": self.mode, "tokens": self.tokens, **lists}

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the basis to an .npz file, which appears whole or not at all.

        Raises:
            NotOursError: if the file exists and is no causal basis.
            OSError: if it can't be written.
        """
        path = Path(path).expanduser()
        require_replaceable([basis_output(path)], force=force)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"layer": self.layer, "mode": self.mode, "tokens": self.tokens, "settings": self.settings}
        arrays = {name: getattr(self, name) for name in ARRAYS}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> CausalBasis:
        """Read a basis that `save` wrote.

        Raises:
            InvalidValueError: if the file is damaged or is no causal basis.
            OSError: if it can't be read.
        """
        path = Path(path).expanduser()
        try:
            with np.load(path, allow_pickle=False) as archive:
                about, arrays = json.loads(str(archive["about"])), {name: archive[name] for name in ARRAYS}
            basis = cls(**arrays, **about)
        except OSError:
            raise
        except Exception as error:  # a dozen types, depending on the damaged byte
            fault = archive_fault(error)
            raise InvalidValueError(f"{path} is no causal basis, or is damaged: {fault}. Delete it, and extract the basis again.") from error
        shapes = [getattr(basis, name).shape for name in ARRAYS]
        k, d = basis.vectors.shape if basis.vectors.ndim == 2 else (-1, -1)
        if shapes != [(k, d), (k,), (k,), (k,), (d,)]:
            raise InvalidValueError(f"The arrays of {path} do not belong together: {shapes}. Delete it, and extract the basis again.")
        return basis


def basis_path(folder: str | Path, layer: int) -> Path:
    """Return the file of a layer's basis in a folder."""
    return Path(folder).expanduser() / f"layer-{layer:03d}.npz"


def basis_output(path: Path) -> Output:
    """Return a causal basis that is going to be written."""
    return Output(path, "a causal basis", _is_basis)


def _is_basis(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in (*ARRAYS, "about")} <= set(archive.namelist())
    except (ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def stored_basis(path: Path, settings: Mapping[str, Any]) -> CausalBasis | None:
    """Return the directions that an earlier extraction has left in a file; None if there is no file.

    Args:
        path: the file.
        settings: what the directions depend on.

    Raises:
        InvalidValueError: if the file is no basis, or was made with other settings. It names them.
    """
    if not path.exists():
        return None
    basis = CausalBasis.load(path)
    different = sorted(name for name in {*settings, *basis.settings} if settings.get(name) != basis.settings.get(name))
    if different:
        raise InvalidValueError(
            f"{path} holds a basis of another extraction; these differ: {', '.join(different)}. Give another folder, or delete the file."
        )
    return basis
