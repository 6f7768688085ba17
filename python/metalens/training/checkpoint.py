"""Checkpoints: everything that the rest of a run depends on, written so that a kill at any moment loses no more than the steps since the last one.

A checkpoint is a folder `step-00000120/` with `state.safetensors` (parameters, optimizer) and `state.json` (step, position in the data, settings, and
the hashes of both files). It is written under another name, forced to the disk, and renamed: a folder of the right name is whole. If it turns out
damaged all the same, the one before it is taken, with a warning.
"""

from __future__ import annotations

import hashlib
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

STATE, RECORD = "state.safetensors", "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One of them, read.

    Attributes:
        arrays: by name.
        record: what JSON can hold.
    """

    arrays: dict[str, mx.array]
    record: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: the folder; made if it is missing.
        keep: how many of the newest stay. Two at least, so that there is one to fall back on.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = max(keep, 2)
        self.path.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in their order."""
        found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, arrays: dict[str, mx.array], record: dict[str, Any]) -> Path:
        """Write one, then remove the oldest, and those of later steps: they belong to a run that fell back behind them.

        Raises:
            OSError: saying so, if it can't be written; those before it are untouched.
        """
        final = self.path / f"step-{step:08d}"
        temporary = self.path / f".{final.name}.{os.getpid()}"
        self._remove_leftovers()
        try:
            temporary.mkdir()
            mx.save_safetensors(str(temporary / STATE), arrays)
            _sync(temporary / STATE)
            whole = {**record, "format": FORMAT, "step": step, "sha256": _sha256(temporary / STATE)}
            text = json.dumps({**whole, "record": _sha256_of(whole)}, indent=1, default=_plain)
            (temporary / RECORD).write_text(text + "\n")
            _sync(temporary / RECORD)
            if final.exists():  # of a run that fell back behind it
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(self.path)
        except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError
            raise OSError(
                f"Could not write the checkpoint {final}: {error}. The ones before it are untouched. Make room, and go on with resume."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        steps = self.steps()
        for old in [*[other for other in steps if other > step], *[other for other in steps if other <= step][: -self.keep]]:
            shutil.rmtree(self.path / f"step-{old:08d}", ignore_errors=True)
        return final

    def _remove_leftovers(self) -> None:
        """Of processes that were killed while they wrote: before the next one is written, which may need the room."""
        for left in self.path.iterdir():
            if re.fullmatch(r"\.step-\d+\.\d+", left.name):
                shutil.rmtree(left, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest one that is whole, with a warning for each that is not; None if there is none."""
        for step in reversed(self.steps()):
            folder = self.path / f"step-{step:08d}"
            try:
                return _read(folder)
            except (OSError, ValueError, RuntimeError) as error:
                message = f"The checkpoint {folder} can't be used ({error}); the one before it is taken, or the run begins anew if there is none."
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of one step.

        Raises:
            OSError, ValueError: if it is missing or damaged.
        """
        return _read(self.path / f"step-{step:08d}")


def _read(folder: Path) -> Checkpoint:
    record: Any = json.loads((folder / RECORD).read_text())
    if not isinstance(record, dict):
        raise InvalidValueError(f"{RECORD} is damaged")
    if record.get("format") != FORMAT:
        raise InvalidValueError(f"it has format {record.get('format')!r}, this version reads {FORMAT}")
    if record.pop("record", None) != _sha256_of(record):
        raise InvalidValueError(f"{RECORD} is damaged")
    if _sha256(folder / STATE) != record["sha256"]:
        raise InvalidValueError(f"{STATE} is damaged")
    arrays = mx.load(str(folder / STATE))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return Checkpoint(arrays, record)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sha256_of(record: dict[str, Any]) -> str:
    """Of what it says, however it is laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """NumPy's numbers, which settings may hold, as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    raise InvalidTypeError(f"{value!r} can't be written as JSON.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
