"""From one kind of lens file to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from metalens.compat.tuned_lens.folder import is_tuned_lens, load, save
from metalens.lenses.lens import TunedLens, lens_files

Format = Literal["tuned-lens", "metalens"]


def convert(
    source: str | Path,
    target: str | Path,
    to: Format | None = None,
    model_name: str | None = None,
    *,
    hub: bool = False,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> tuple[Path, Path]:
    """Read a lens of either kind, and write it as the other.

    Args:
        source: our pair of .npz and .json, or a folder of tuned-lens's.
        target: the pair or the folder to write.
        to: 'tuned-lens' or 'metalens'; None = what the source is not. 'metalens' stores every W whole, whatever variant the source is: a file that
            mlxterp loads.
        model_name: the model's path or hub id, for tuned-lens's config.json and for `origin`; None = what the source says.
        hub: take `source` for the id of a lens on the hub if no file has that name.
        dtype: of the numbers in tuned-lens's file.

    Returns:
        the two files written.

    Raises:
        FileNotFoundError: if there is no lens at the source.
        ValueError: if it is damaged, or tuned-lens's file needs a model's name that is not known.
    """
    theirs = is_tuned_lens(source)
    if not theirs and not any(file.is_file() for file in lens_files(source)):
        if not hub:
            pair, config = lens_files(source)
            raise FileNotFoundError(f"No lens at {source}: neither {pair.name} and {config.name}, nor a folder with params.pt and config.json.")
        theirs = True
    lens = load(source) if theirs else TunedLens.load(source)
    if (to or ("metalens" if theirs else "tuned-lens")) == "tuned-lens":
        save(lens, target, model_name, dtype=dtype)
        return Path(target) / "params.pt", Path(target) / "config.json"
    full = lens.to_full()
    if model_name is not None:
        full.origin["model"] = model_name
    full.save(target)
    return lens_files(target)
