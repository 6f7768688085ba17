"""Snapshots of upstream's training, snapshot_<step>.pth: its lens, read without torch and without running what the file contains.

A snapshot is a dict of the state dicts "lens", "optim", "scheduler" and "dataloader", and of "step" and "wandb_id". The lens's has the translators as
"layer_translators.<i>.weight" and "...bias", and the unembedding, which is not read. The optimizer's state is read over, and so is that of the data,
which may name any function.

Source: State.save in tuned_lens/scripts/train_loop.py of AlignmentResearch/tuned-lens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from metalens.lenses.lens_file import LensData
from metalens.lenses.pickled import Tensor
from metalens.lenses.torch_file import Snapshot
from metalens.lenses.tuned_lens_folder import LensConfig, lens_of
from metalens.utils.errors import InvalidValueError

SUFFIX = ".pth"
TRANSLATORS = "layer_translators."
WRAPPER = "module."  # before every name, if the lens was in torch's DistributedDataParallel
WHAT = "a snapshot of tuned-lens's training"


def is_snapshot(path: str | Path) -> bool:
    """Return whether the path is a file whose name ends as those of snapshots."""
    path = Path(path).expanduser()
    return path.suffix == SUFFIX and path.is_file()


def read_snapshot(path: str | Path) -> LensData:
    """Read the lens of a snapshot.

    Returns:
        the lens, as `metalens.lenses.tuned_lens_folder.read_folder`. The snapshot does not name its model; the provenance has its step
        under "tuned_lens".

    Raises:
        InvalidValueError: if the file is damaged, or is not a snapshot.
        OSError: if it can't be read.
    """
    with Snapshot(Path(path).expanduser(), WHAT) as snapshot:
        with snapshot.errors():
            translators = _translators(snapshot["lens"])
            weight = translators.get("0.weight")
            if weight is None:
                raise InvalidValueError(f"its lens has no translators ({TRANSLATORS}0.weight and so on)")
            count = sum(name.endswith(".weight") for name in translators)
            described = LensConfig("", int(weight.shape[0]) if weight.shape else 0, count, bias="0.bias" in translators)
        lens = lens_of(described, snapshot.tensors(translators, described.shapes(len(translators))))
        step = snapshot["step"]
    if type(step) is not int:
        return lens
    return replace(lens, description=replace(lens.description, provenance={"tuned_lens": {"step": step}}))


def _translators(state: object) -> dict[str, Tensor]:
    """Return the tensors of the translators, by the names that params.pt gives them."""
    if not isinstance(state, dict):
        raise InvalidValueError("it has no 'lens'")
    named = {str(name).removeprefix(WRAPPER): tensor for name, tensor in state.items()}
    found = {name.removeprefix(TRANSLATORS): tensor for name, tensor in named.items() if name.startswith(TRANSLATORS)}
    if not all(type(tensor) is Tensor for tensor in found.values()):
        raise InvalidValueError("its translators are no tensors of float32, float16, bfloat16 or float64 numbers")
    return found
