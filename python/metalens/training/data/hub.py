"""Data sets of the Hugging Face hub, streamed. Needs the package datasets."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from metalens.training.data.readers import Identity, Memory, Piece, Source, pieces_of
from metalens.utils.errors import InvalidValueError

log = logging.getLogger(__name__)

NAME = re.compile(r"(?:hf:)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<configuration>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubDataset(Source):
    """One split of a data set, at one commit of its repository.

    Args:
        dataset: id on the hub, owner/name.
        configuration: configuration of the data set. None = its default.
        revision: branch, tag or commit. None = 'main'.
        split: split of the data set.
        field: column with the text.
    """

    def __init__(
        self, dataset: str, *, configuration: str | None = None, revision: str | None = None, split: str = "train", field: str = "text"
    ) -> None:
        self.dataset = dataset
        self.configuration = configuration
        self.revision = revision or "main"
        self.split = split
        self.field = field
        self.name = f"{dataset}{f':{configuration}' if configuration else ''}@{self.revision} ({split})"
        self._commit: str | None = None

    @classmethod
    def from_name(cls, name: str, *, field: str, split: str) -> HubDataset | None:
        """Return the data set of a name: `name`, `name:configuration`, `name@revision` or `name:configuration@revision`. None = no such name."""
        match = NAME.fullmatch(name)
        if match is None or match["name"].startswith("."):
            return None
        return cls(match["name"], configuration=match["configuration"], revision=match["revision"], split=split, field=field)

    def identity(self, memory: Memory | None = None) -> Identity:
        """Return the names and the commit of the data set. Ask the hub for the commit; without a connection use the commit of the last time.

        Raises:
            InvalidValueError: if the hub can't be reached and no commit is known.
        """
        self._commit = self._find_commit(memory)
        return {
            "kind": "hub",
            "dataset": self.dataset,
            "configuration": self.configuration,
            "commit": self._commit,
            "split": self.split,
            "field": self.field,
        }

    def _find_commit(self, memory: Memory | None) -> str:
        if COMMIT.fullmatch(self.revision):
            return self.revision
        fact = f"hub {self.dataset}@{self.revision}"
        try:
            commit = str(importlib.import_module("huggingface_hub").HfApi().dataset_info(self.dataset, revision=self.revision).sha)
        except Exception as error:  # the hub's errors and those of the connection have no common base
            known = memory.recall(fact) if memory is not None else None
            if not isinstance(known, str):
                raise self._unreachable(error) from error
            log.warning("The hub can't be reached for %s (%s); using the revision of the last time, %s.", self.dataset, error, known)
            return known
        if memory is not None:
            memory.remember(fact, commit)
        return commit

    def _unreachable(self, error: Exception) -> InvalidValueError:
        return InvalidValueError(
            f"There is no file or folder {self.dataset!r}, and as a data set of the Hugging Face hub {self.name} can't be read: {error} "
            "Check the name, the configuration (name:configuration), the split and the connection."
        )

    def pieces(self) -> Iterator[Piece]:
        """Yield one document per row, streamed."""
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise InvalidValueError(
                f"There is no file or folder {self.dataset!r}, and reading it as a data set of the Hugging Face hub needs the package datasets. "
                "Check the path, or install the package with: pip install 'metalens[data]'"
            ) from error
        try:
            rows = iter(
                datasets.load_dataset(self.dataset, self.configuration, split=self.split, revision=self._commit or self.revision, streaming=True)
            )
        except Exception as error:  # as above
            raise self._unreachable(error) from error
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # as above
                raise self._unreachable(error) from error
            number += 1
            yield from pieces_of(row, self.field, f"{self.name}, row {number}")
        if not number:
            raise InvalidValueError(f"{self.name} is empty. Name another split.")
