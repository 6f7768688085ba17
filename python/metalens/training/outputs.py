"""What a run writes: the lens and the checkpoints, which no other run may write at the same time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from metalens.lenses.lens import TunedLens
from metalens.lenses.lens_file import lens_files, lens_outputs
from metalens.lenses.opening import files_read
from metalens.training.checkpoint import LOCK, CheckpointFolder, default_folder, mark_finished, numbers_of_newest, prepare_folder
from metalens.training.data import Corpus
from metalens.training.data.readers import FileSource, Source
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import require_writable
from metalens.utils.lock import locked
from metalens.utils.outputs import require_replaceable


@dataclass(frozen=True)
class RunOutputs:
    """The places of a run's results.

    Attributes:
        out: path of the lens. None = write no lens.
        folder: folder of the checkpoints. None = write none.
        given: that folder as the caller has opened it, or None.
    """

    out: str | Path | None
    folder: Path | None
    given: CheckpointFolder | None = None

    @classmethod
    def of(cls, out: str | Path | None, given: str | Path | CheckpointFolder | None, every: int | None) -> RunOutputs:
        """Return the places that the arguments of `train` name.

        Args:
            out: path of the lens, or None.
            given: folder of the checkpoints. None = OUT.checkpoints, or without `out` none.
            every: steps between checkpoints. None = write none.

        Raises:
            InvalidValueError: for a name that is empty, which as a path would be the current folder.
        """
        if given == "":
            raise InvalidValueError("The name of checkpoint_dir is empty. Name a folder, or give None for the default.")
        if every is None:
            return cls(out, None)
        if isinstance(given, CheckpointFolder):
            return cls(out, given.path, given)
        if given is not None:
            return cls(out, Path(given))
        return cls(out, None if out is None else default_folder(lens_files(out)[0]))

    def checkpoints(self) -> CheckpointFolder | None:
        """Open the folder of the checkpoints, which makes it. Call `claim` before: it refuses to write beside what is not ours."""
        return None if self.folder is None else self.given or CheckpointFolder(self.folder)

    def claim(
        self, locks: contextlib.ExitStack, inputs: Corpus | list[Source], config: object, start_from: object, resume: bool, force: bool
    ) -> None:
        """Check that a run may write its results, and keep other runs from writing there while `locks` is open.

        Args:
            locks: takes the locks.
            inputs: the text, whose files must not be replaced.
            config: the settings, as given to `train`; a file of them must not be replaced.
            start_from: the lens that the run starts from, as given to `train`; its files must not be replaced.
            resume: whether the run goes on from a checkpoint.
            force: whether files that are not a lens may be replaced.
        """
        if self.out is not None:
            read: list[str | Path] = [] if isinstance(inputs, Corpus) else [source.path for source in inputs if isinstance(source, FileSource)]
            if isinstance(config, (str, Path)):
                read.append(config)
            if isinstance(start_from, (str, Path)):
                read += files_read(start_from)
            for file in lens_files(self.out):
                require_writable(file)
            require_replaceable(lens_outputs(self.out), force=force, inputs=read)
            weights = lens_files(self.out)[0]
            locks.enter_context(locked(weights.with_name(f".{weights.name}{LOCK}"), str(self.out)))
        if self.folder is not None:
            if not self.folder.exists():
                locks.callback(_remove_empty, self.folder)  # of a run that ends before its first checkpoint
            require_writable(self.folder / LOCK)
            locks.enter_context(locked(self.folder / LOCK, str(self.folder)))
            prepare_folder(self.folder, resume)

    def numbers_of_newest(self) -> tuple[int | None, int]:
        """Return the tokens that were seen until the newest checkpoint, None if it is unknown, and the steps that were skipped."""
        newest = {} if self.folder is None else numbers_of_newest(self.folder)
        return newest.get("tokens"), newest.get("skipped", 0)

    def write(self, lens: TunedLens, force: bool) -> None:
        """Write the lens, and mark the run as finished."""
        if self.out is not None:
            lens.save(self.out, force=force)
        if self.folder is not None:
            mark_finished(self.folder)


def _remove_empty(folder: Path) -> None:
    """Delete a folder if there is nothing in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()
