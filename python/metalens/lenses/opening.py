"""Open a lens wherever it is: a pair of files of metalens or mlxterp, a folder of tuned-lens, or a lens of tuned-lens's collection on the hub.

    my-lens, my-lens.npz, my-lens.json     the pair; it goes before a folder of the same name
    folder, folder/params.pt               a folder of tuned-lens
    hf:ID, hf:ID@REVISION                  a lens on the hub, such as hf:EleutherAI/pythia-160m-deduped

A name without 'hf:' is never looked for on the hub: it may be a mistyped path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from metalens.lenses.lens_file import LensData, lens_files, read_lens
from metalens.lenses.tuned_lens_folder import CONFIG, PARAMS, folder_of, is_tuned_lens, read_folder, read_hub_lens

HUB = "hf:"


def lens_kind_at(path: str | Path) -> Literal["pair", "folder", "hub"] | None:
    """Return what a path names, None if there is no lens. Of a pair, one of the two files may be missing."""
    if str(path).startswith(HUB):
        return "hub"
    if any(file.is_file() for file in lens_files(path)):
        return "pair"
    return "folder" if is_tuned_lens(path) else None


def read_lens_at(path: str | Path, *, hub: bool = False) -> LensData:
    """Read a lens.

    Args:
        path: a path or a name as in the table above.
        hub: if there is no lens at the path, take it as the id of a lens on the hub.

    Raises:
        FileNotFoundError: if there is no lens at the path, or no such lens on the hub, or the hub can't be reached.
        InvalidValueError: if the files are damaged, are not a lens, disagree, or hold NaN or infinity.
    """
    kind = lens_kind_at(path)
    if kind == "pair":
        return read_lens(path)
    if kind == "folder":
        return read_folder(path)
    if kind == "hub" or hub:
        lens_id, _, revision = str(path).removeprefix(HUB).partition("@")
        return read_hub_lens(lens_id, revision=revision or "main", may_be_folder=kind is None)
    pair, config = lens_files(path)
    raise FileNotFoundError(
        f"No lens at {path}: neither {pair.name} and {config.name}, nor a folder with {PARAMS} and {CONFIG}. "
        f"A lens of tuned-lens's collection on the hub is named {HUB}{path}."
    )


def files_read(path: str | Path) -> list[Path]:
    """Return the files that `read_lens_at` reads, so that no output replaces them; [] for a lens on the hub."""
    kind = lens_kind_at(path)
    if kind == "folder":
        return [folder_of(path) / name for name in (PARAMS, CONFIG)]
    return [] if kind == "hub" else list(lens_files(path))
