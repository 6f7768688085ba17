"""Open a lens of either file format, and convert one format to the other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from metalens.compat.tuned_lens.folder import folder_outputs, save
from metalens.lenses.lens import TunedLens
from metalens.lenses.lens_file import lens_files, lens_outputs
from metalens.lenses.opening import HUB, files_read, lens_kind_at, read_lens_at
from metalens.models.gguf import convert_gguf, is_gguf
from metalens.utils.outputs import require_replaceable

Format = Literal["tuned-lens", "metalens"]


def load_lens(path: str | Path, *, hub: bool | None = None) -> TunedLens:
    """Read a lens, as `TunedLens.load` does.

    Args:
        path: the .npz and .json pair (with or without a suffix), a folder with params.pt and config.json, or 'hf:' and the id of a
            lens of tuned-lens's collection on the Hugging Face hub.
        hub: deprecated: True = if there is no lens at the path, take it as such an id, without 'hf:'.

    Raises:
        FileNotFoundError: if there is no lens at the path, or none with this id on the hub.
        InvalidValueError: if the files are damaged or are not a lens.
    """
    return TunedLens.from_data(read_lens_at(_named(path, hub)))


def _named(path: str | Path, hub: bool | None) -> str | Path:
    """Return the name of a lens, with 'hf:' if `hub`, which is deprecated, asks for it."""
    if hub is None:
        return path
    warnings.warn(f"hub= is deprecated and will be removed in the next release: name the lens '{HUB}{path}'.", DeprecationWarning, stacklevel=3)
    return f"{HUB}{path}" if hub and lens_kind_at(path) is None else path


def convert(
    source: str | Path,
    target: str | Path,
    to: Format | None = None,
    model_name: str | None = None,
    *,
    hub: bool | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    force: bool = False,
) -> tuple[Path, Path]:
    """Read a lens of either format and write it in the other; or read a model in a GGUF file and write a folder in mlx-lm's format.

    When the target is metalens, all translators are written as full matrices, whatever the variant of the source, so
    mlxterp can load the result.

    Args:
        source: a lens, as in `load_lens`, or a GGUF file.
        target: the pair or the folder to write.
        to: 'tuned-lens' or 'metalens'; None = the format that the source does not have.
        model_name: path or hub id of the model, for tuned-lens's config.json and for the provenance; None = the name in
            the source.
        hub: as in `load_lens`.
        dtype: number format of the tensors in tuned-lens's file (None = float32), or of a model (see
            `metalens.models.gguf.convert_gguf`, which also returns a report).
        force: replace files of the target's names that are not a lens, or the folder of a model that an earlier conversion
            wrote.

    Returns:
        the two files written; of a model, config.json and model.safetensors.

    Raises:
        FileNotFoundError: if there is no lens at the source.
        FileExistsError: if the folder of a model exists; with `force`, if it has other files.
        MissingPackageError: if the `gguf` package is needed and not installed.
        InvalidValueError: if the lens or the model is damaged, if tuned-lens's file needs the name of the model and it is not known,
            if the target is the source, or if a file of the target's name is not a lens.
    """
    if is_gguf(source):
        folder = convert_gguf(source, target, dtype, force=force).folder
        return folder / "config.json", folder / "model.safetensors"
    source = _named(source, hub)
    lens = load_lens(source)
    theirs, sources = lens_kind_at(source) != "pair", files_read(source)
    if (to or ("metalens" if theirs else "tuned-lens")) == "tuned-lens":
        require_replaceable(folder_outputs(target), force=True, inputs=sources)
        save(lens, target, model_name, dtype=dtype or "float32", force=force)
        return Path(target) / "params.pt", Path(target) / "config.json"
    require_replaceable(lens_outputs(target), force=True, inputs=sources)
    full = lens.to_full()
    if model_name is not None:
        full.provenance["model"] = model_name
    full.save(target, force=force)
    return lens_files(target)
