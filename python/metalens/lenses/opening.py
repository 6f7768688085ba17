"""Open a lens wherever it is: a pair of metalens or mlxterp, a folder or a training snapshot of tuned-lens, or a lens of its collection on the hub.

    my-lens, my-lens.npz, my-lens.json     the pair; it goes before a folder of the same name
    folder, folder/params.pt               a folder of tuned-lens
    snapshot_100.pth                       a snapshot of tuned-lens's training
    hf:ID, hf:ID@REVISION                  a lens on the hub, such as hf:EleutherAI/pythia-160m-deduped

A name without 'hf:' is never looked for on the hub: it may be a mistyped path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from metalens.lenses.lens_file import LensData, lens_files, read_lens
from metalens.lenses.tuned_lens_folder import CONFIG, PARAMS, folder_of, is_tuned_lens, read_folder, read_hub_lens
from metalens.lenses.tuned_lens_snapshot import SUFFIX, is_snapshot, read_snapshot

HUB = "hf:"


def lens_kind_at(path: str | Path) -> Literal["pair", "folder", "snapshot", "hub"] | None:
    """Return what a path names, None if there is no lens. Of a pair, one of the two files may be missing."""
    if str(path).startswith(HUB):
        return "hub"
    if any(file.is_file() for file in lens_files(path)):
        return "pair"
    if is_tuned_lens(path):
        return "folder"
    return "snapshot" if is_snapshot(path) else None


def hub_name(name: str) -> tuple[str, str | None]:
    """Return the id and the revision of 'hf:ID@REVISION'. The revision is None if the name has none."""
    lens_id, _, revision = name.removeprefix(HUB).partition("@")
    return lens_id, revision or None


def read_lens_at(path: str | Path) -> LensData:
    """Read a lens.

    Args:
        path: a path or a name as in the table above.

    Raises:
        FileNotFoundError: if there is no lens at the path, or no such lens on the hub, or the hub can't be reached.
        InvalidValueError: if the files are damaged, are not a lens, disagree, or hold NaN or infinity.
    """
    kind = lens_kind_at(path)
    if kind == "pair":
        return read_lens(path)
    if kind == "folder":
        return read_folder(path)
    if kind == "snapshot":
        return read_snapshot(path)
    if kind == "hub":
        lens_id, revision = hub_name(str(path))
        return read_hub_lens(lens_id, revision=revision or "main", may_be_folder=False)
    pair, config = lens_files(path)
    raise FileNotFoundError(
        f"No lens at {path}: neither {pair.name} and {config.name}, nor a folder with {PARAMS} and {CONFIG}, "
        f"nor a snapshot of tuned-lens's training ({SUFFIX}). "
        f"A lens of tuned-lens's collection on the hub is named {HUB}{path}."
    )


def files_read(path: str | Path) -> list[Path]:
    """Return the files that `read_lens_at` reads, so that no output replaces them; [] for a lens on the hub."""
    kind = lens_kind_at(path)
    if kind == "folder":
        return [folder_of(path) / name for name in (PARAMS, CONFIG)]
    if kind == "snapshot":
        return [Path(path).expanduser()]
    return [] if kind == "hub" else list(lens_files(path))
