"""Training text: from names of files, folders and hub data sets to documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from metalens.training.data.hub import HubDataset
from metalens.training.data.readers import FileSource, JsonLines, ParquetFile, Source, TextFile
from metalens.utils.errors import InvalidValueError

JSON_LINES = (".jsonl", ".jsonl.gz", ".json-lines", ".ndjson", ".json")
PARQUET = (".parquet",)
SUFFIXES = (".txt", ".txt.gz", *JSON_LINES, *PARQUET)


def file_source(path: Path, field: str) -> FileSource:
    """Return the reader of a file, chosen by the end of its name. A file with another ending is read as plain text."""
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return JsonLines(path, field)
    return ParquetFile(path, field) if name.endswith(PARQUET) else TextFile(path)


def find_sources(sources: str | Path | Source | Sequence[str | Path | Source], *, field: str = "text", split: str = "train") -> list[Source]:
    """Return the readers of files, folders and hub data sets, in order.

    Args:
        sources: a file; a folder (all files in it and below it with a known ending, sorted, without hidden ones); the id of a data set on the
            Hugging Face hub (`owner/name`, `owner/name:configuration@revision`, with or without `hf:` before it); a Source; or several of these.
        field: field or column with the text.
        split: split of hub data sets.

    Raises:
        InvalidValueError: if a name has no file, folder or data set, or a folder has no readable file.
    """
    found: list[Source] = []
    for name in [sources] if isinstance(sources, str | Path | Source) else sources:
        if isinstance(name, Source):
            found.append(name)
            continue
        if name == "":
            raise InvalidValueError("The name of a text is empty. Name a file, a folder, or a data set of the Hugging Face hub.")
        path = Path(name).expanduser()
        hub = None if isinstance(name, Path) else HubDataset.from_name(name, field=field, split=split)
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file()]
            files = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not files:
                raise InvalidValueError(
                    f"There is no text in the folder {path}: no file ends in {', '.join(SUFFIXES)}. Name a file or another folder."
                )
            found += [file_source(p, field) for p in files]
        elif path.exists() and not path.is_file():
            raise InvalidValueError(f"{path} is a pipe or a device, and a text is read more than once. Save it to a file, and name that.")
        elif path.exists():
            found.append(file_source(path, field))
        elif hub is not None and not path.name.lower().endswith(SUFFIXES):
            found.append(hub)
        else:
            raise InvalidValueError(f"There is no file or folder {name}. Check the path.")
    if not found:
        raise InvalidValueError("No text was given. Name a file, a folder, or a data set of the Hugging Face hub.")
    return found


def documents(sources: Iterable[Source]) -> Iterator[str]:
    """Yield the documents of all sources as whole texts, one in memory at a time."""
    parts: list[str] = []
    for source in sources:
        for piece in source.pieces():
            if piece.starts and parts:
                yield "".join(parts)
                parts = []
            parts.append(piece.text)
    if parts:
        yield "".join(parts)
