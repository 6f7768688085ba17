"""Checkpoints: everything that the rest of a run depends on. A kill at any moment loses no more than the steps since the last checkpoint.

A checkpoint is a folder `step-00000120/` with `state.safetensors` (parameters, optimizer) and `state.json` (step, position in the text, settings, and
the hashes of both files). It is written under another name, forced to the disk, and renamed: a folder of the right name is whole. If it is damaged
all the same, the checkpoint before it is used, with a warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.utils.errors import InvalidTypeError, InvalidValueError
from metalens.utils.files import require_writable, sha256_of, sha256_of_values

STATE, RECORD = "state.safetensors", "state.json"
FORMAT = 1
LOCK = ".lock"  # a file of the process that writes here
FINISHED = "finished"  # an empty file beside the checkpoints of a run that reached its end


class UnfinishedRunError(InvalidValueError):
    """A folder has checkpoints of a run that has not finished, and a new run would remove them.

    Args:
        folder: the folder.
        remedy: what to do, in a sentence.

    Attributes:
        folder: as given.
    """

    def __init__(self, folder: Path, remedy: str = "go on with resume=True, remove the folder, or give another checkpoint_dir.") -> None:
        self.folder = folder
        super().__init__(f"{folder} has checkpoints of a run that has not finished: {remedy}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        arrays: arrays by name.
        record: JSON values by name.
    """

    arrays: dict[str, mx.array]
    record: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: the folder, which is made if it is missing.
        keep: number of newest checkpoints to keep, at least 2, so that there is one to fall back on.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = max(keep, 2)
        self.path.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, damaged ones included, in order."""
        found = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def remove_all(self) -> None:
        """Delete all checkpoints. Whatever else is in the folder stays."""
        for step in self.steps():
            _remove(self.path / f"step-{step:08d}")

    def save(self, step: int, arrays: dict[str, mx.array], record: dict[str, Any]) -> Path:
        """Write a checkpoint. Then delete the oldest ones, and those of later steps: the run has fallen back behind them.

        Raises:
            OSError: if it can't be written; the checkpoints before it are untouched.
        """
        final = self.path / f"step-{step:08d}"
        temporary = self.path / f".{final.name}.{os.getpid()}"
        self._remove_leftovers()
        try:
            temporary.mkdir()
            with (temporary / STATE).open("wb") as file:  # MLX takes no path that is not UTF-8
                mx.save_safetensors(file, arrays)
            _sync(temporary / STATE)
            whole = {**record, "format": FORMAT, "step": step, "sha256": sha256_of(temporary / STATE)}
            text = json.dumps({**whole, "record": _sha256_of(whole)}, indent=1, default=_plain_number)
            (temporary / RECORD).write_text(text + "\n")
            _sync(temporary / RECORD)
            if final.exists():  # the run fell back behind it
                _remove(final)
            temporary.rename(final)
            _sync(self.path)
        except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError
            raise OSError(
                f"Could not write the checkpoint {final}: {error}. The ones before it are untouched. Make room, and go on with resume."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for later in [other for other in self.steps() if other > step]:
            _remove(self.path / f"step-{later:08d}")
        self.remove_oldest(step)
        return final

    def remove_oldest(self, step: int) -> None:
        """Delete the checkpoints up to a step, but for the newest ones of these."""
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            _remove(self.path / f"step-{old:08d}")

    def _remove_leftovers(self) -> None:
        """Delete partial checkpoints left by killed processes, to free space before writing."""
        for left in self.path.iterdir():
            if re.fullmatch(r"\.step-\d{8,}\.\d+", left.name):
                _remove(left)

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None if there is none. Warn about each damaged one."""
        for step in reversed(self.steps()):
            folder = self.path / f"step-{step:08d}"
            try:
                return _read(folder)
            except (OSError, ValueError, RuntimeError) as error:
                message = f"The checkpoint {folder} can't be used ({error}); the one before it is taken, or the run begins anew if there is none."
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None

    def read(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step.

        Raises:
            OSError, InvalidValueError: if it is missing or damaged.
        """
        return _read(self.path / f"step-{step:08d}")


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has nothing but the files of a checkpoint, whole or damaged."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    if not names <= {STATE, RECORD}:
        return False
    return STATE in names or not names or b'"sha256"' in (folder / RECORD).read_bytes()


def _remove(folder: Path) -> None:
    """Delete a checkpoint. A folder that holds anything else stays as it is: metalens did not write it."""
    if _is_checkpoint(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> Checkpoint:
    record = _read_record(folder)
    if sha256_of(folder / STATE) != record["sha256"]:
        raise InvalidValueError(f"{STATE} is damaged")
    with (folder / STATE).open("rb") as file:  # as in `save`
        arrays = mx.load(file, format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(arrays)
    return Checkpoint(arrays, record)


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint (InvalidValueError, ValueError, OSError)."""
    record: Any = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise InvalidValueError(f"{RECORD} is damaged")
    if record.get("format") != FORMAT:
        raise InvalidValueError(f"it has format {record.get('format')!r}, this version reads {FORMAT}")
    if record.pop("record", None) != _sha256_of(record) or type(record.get("step")) is not int or "sha256" not in record:
        raise InvalidValueError(f"{RECORD} is damaged")
    return record


def _sha256_of(record: dict[str, Any]) -> str:
    """Return the hash of the values of a record."""
    return sha256_of_values(record, _plain_number)


def _plain_number(value: Any) -> Any:
    """Return a number of NumPy, which settings may hold, as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    raise InvalidTypeError(f"{value!r} can't be written as JSON.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------ the folder of a run


def default_folder(out: Path) -> Path:
    """Return the folder for the checkpoints of a lens: OUT.checkpoints, beside OUT.npz."""
    return out.with_name(out.stem + ".checkpoints")


def parts_of(folder: Path) -> list[CheckpointFolder]:
    """Return the folders of processes that divided the layers of a run, rank-<rank>-of-<size>, which have checkpoints."""
    names = sorted(path for path in folder.glob("rank-*-of-*") if re.fullmatch(r"rank-\d+-of-\d+", path.name) and path.is_dir())
    return [part for part in map(CheckpointFolder, names) if part.steps()]


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make a folder ready for a run: delete the checkpoints of a finished run, unless the run is to be resumed.

    Nothing but whole or damaged checkpoints is deleted, whatever its name.

    Raises:
        UnfinishedRunError: if the folder has checkpoints of a run that has not finished, and this one does not resume it.
        OSError: if the folder can't be written.
    """
    require_writable(folder / FINISHED)
    if resume:
        return
    old = [part for part in [CheckpointFolder(folder), *parts_of(folder)] if part.steps()]
    finished = folder / FINISHED
    if old and not finished.exists():
        raise UnfinishedRunError(folder)
    for part in old:
        part.remove_all()
        if part.path != folder and not any(part.path.iterdir()):
            part.path.rmdir()
    if finished.is_file() and not finished.stat().st_size:
        finished.unlink()


def mark_finished(folder: Path) -> None:
    """Note that the run of a folder has reached its end."""
    (folder / FINISHED).touch()


def numbers_of_newest(folder: Path) -> dict[str, int]:
    """Return the numbers of the newest checkpoint of a folder ("tokens", "skipped", ...), {} if there is none."""
    return {name: value for name, value in (_record_of_newest(folder) or {}).items() if type(value) is int}


def config_of_newest(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the run of the newest checkpoint of a folder, None if there is none."""
    config = (_record_of_newest(folder) or {}).get("config")
    return dict(config) if isinstance(config, dict) else None


def _record_of_newest(folder: Path) -> dict[str, Any] | None:
    """Return the record of the newest checkpoint whose record is whole."""
    found = [(step, part.path) for part in [CheckpointFolder(folder), *parts_of(folder)] for step in part.steps()]
    for step, path in sorted(found, reverse=True):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            return _read_record(path / f"step-{step:08d}")
    return None
