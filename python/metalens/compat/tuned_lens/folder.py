"""Read and write lenses of tuned-lens as `TunedLens`. `metalens.lenses.tuned_lens_folder` says how layers and numbers correspond."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.lenses.opening import HUB, hub_name
from metalens.lenses.torch_file import WRITABLE, write_tensors
from metalens.lenses.tuned_lens_folder import CONFIG, PARAMS, LensConfig, folder_outputs, is_tuned_lens, read_folder, read_hub_lens
from metalens.models.layers import EMBEDDING
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write
from metalens.utils.outputs import require_replaceable
from metalens.utils.warn import warn_caller

__all__ = ["LensConfig", "folder_outputs", "is_tuned_lens", "load", "save"]


def load(
    path_or_id: str | Path,
    repo_id: str | None = None,
    repo_type: str | None = None,
    revision: str = "main",
    subfolder: str = "lens",
    cache_dir: str | Path | None = None,
) -> TunedLens:
    """Read a lens of tuned-lens. This needs no torch, and runs nothing that the files contain.

    Args:
        path_or_id: a folder with params.pt and config.json; else the id of a lens on the Hugging Face hub, e.g.
            'EleutherAI/pythia-160m-deduped'. Here, as in tuned-lens, it needs no 'hf:' before it; 'hf:ID@REVISION' names a revision too.
        repo_id: repository on the hub. None = $TUNED_LENS_REPO_ID, or AlignmentResearch/tuned-lens.
        repo_type: type of the repository. None = $TUNED_LENS_REPO_TYPE, or 'space'.
        revision: revision of the repository. One in the name goes before it.
        subfolder: folder of the repository that contains the lenses' folders.
        cache_dir: folder for downloads; None = the hub's own cache.

    Returns:
        a full lens in float32, with the identity as its last translator. `provenance` has the model's "model" and
        "revision", and the hash of the unembedding under "tuned_lens". The translator of the embedding is there
        if it is not the identity. Adding I rounds the diagonal of A to 6e-8; all else is exact.

    Raises:
        FileNotFoundError: if there is no such folder, and the hub has no such lens or cannot be reached.
        InvalidValueError: if the files are damaged, disagree, or are not a lens.
    """
    if is_tuned_lens(path_or_id):
        return TunedLens.from_data(read_folder(path_or_id))
    lens_id, named = hub_name(str(path_or_id)) if str(path_or_id).startswith(HUB) else (str(path_or_id), None)
    return TunedLens.from_data(read_hub_lens(lens_id, repo_id, repo_type, named or revision, subfolder, cache_dir))


def save(
    lens: TunedLens,
    folder: str | Path,
    model_name: str | None = None,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    force: bool = False,
) -> None:
    """Write a lens as params.pt and config.json, which upstream's TunedLens loads. Each file appears whole or not at all.

    Upstream has no translator for the last block's output. That translator is left out, with a warning if it is not the
    identity. Without a translator of the embedding, upstream's is zero.

    Args:
        lens: a lens of any variant. Every translator is written as a full matrix.
        folder: folder for the files; it is created if it is missing.
        model_name: path or hub id of the model. None = the name that the lens remembers.
        revision: revision of the model. None = the revision that the lens remembers.
        dtype: number format of the tensors.
        force: replace files of these names that are not a lens of tuned-lens.

    Raises:
        NotOursError: if the folder has a params.pt or config.json that is not a lens's: every model has a config.json.
        InvalidValueError: if the name of the model is not known, the dtype is another, or a number has no finite form
            in this dtype.
        OSError: if a file cannot be written.
    """
    if dtype not in WRITABLE:
        raise InvalidValueError(f"dtype must be one of {', '.join(WRITABLE)}, got {dtype!r}.")
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a lens of tuned-lens is a folder with {PARAMS} and {CONFIG}. Give the name of a folder.")
    require_replaceable(folder_outputs(folder), force=force)
    remembered = lens.provenance.get("model")
    model_name = model_name or remembered
    if not isinstance(model_name, str):
        raise InvalidValueError(
            "config.json names the model of the lens, and this lens does not remember its model: give its name (--model, in Python model_name)."
        )
    own = model_name == remembered
    about: Any = lens.provenance.get("tuned_lens", {})
    unembed_hash = about.get("unembed_hash") if own and isinstance(about, dict) else None
    revision = revision or (lens.provenance.get("revision") if own else None)
    config = LensConfig(model_name, lens.hidden_dim, lens.num_layers, True, revision, unembed_hash)
    weight, bias = lens.dense(lens.num_layers - 1)
    if to_float(mx.any(weight != mx.eye(lens.hidden_dim))) or to_float(mx.any(bias != 0)):
        warn_caller(
            f"tuned-lens has no translator for the last block's output: that of layer {lens.num_layers - 1}, which is not the identity, is left out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG) as description, atomic_write(folder / PARAMS) as weights:  # moved into place when both are written
        write_tensors(weights, config.shapes(2 * lens.num_layers), _residuals(lens), dtype)
        description.write_text(json.dumps(asdict(config), indent=2) + "\n")


def _residuals(lens: TunedLens) -> Iterator[mx.array]:
    """Yield A_ref[0], b_ref[0], A_ref[1], ... of upstream, one after another."""
    for layer in (EMBEDDING, *range(lens.num_layers - 1)):
        weight, bias = lens.dense(layer)
        yield weight.astype(mx.float32) - mx.eye(lens.hidden_dim)
        yield bias
