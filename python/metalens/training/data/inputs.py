"""The forms in which a caller may give training data, told apart: token ids, texts, and names of files, folders and hub data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np

from metalens.models.tokenization import as_token_ids
from metalens.training.data.corpus import Corpus
from metalens.training.data.in_memory import ChatList, TextList
from metalens.training.data.readers import Source
from metalens.training.data.sources import SUFFIXES, find_sources
from metalens.utils.errors import InvalidTypeError, InvalidValueError

TrainingData: TypeAlias = Corpus | str | Path | Source | mx.array | np.ndarray | Sequence[Any]

HUB = "hf:"
LONGEST_FILE_NAME = 255  # bytes of one part of a path, on all usual file systems


def read_inputs(data: TrainingData, *, field: str = "text", split: str = "train") -> Corpus | list[Source]:
    """Return training data as a Corpus (of token ids) or as sources of text, which are still to be tokenized.

    A string alone is never a text: it names a file, a folder, or with 'hf:' before it a data set of the Hugging Face hub. A Path always is a file or
    a folder. In a list, a string is a name if such a file exists, if it begins with 'hf:', or if it ends as files of text do ('my notes.txt'). It is
    a text if it has a space or a line break, or is too long for the name of a file. A single word is what the others are, or alone a name. So a
    mistyped name is an error, not a text.

    Args:
        data: a Corpus; a name; a list of names; a list of texts, each a document; a list of messages, which is a conversation; a list of
            conversations, each such a list or a record with "messages" or with "prompt" and "completion"; token ids: a list, an array, or a list of
            these, which are joined.
        field: field or column with the text, in files that have several.
        split: split of hub data sets.

    Raises:
        InvalidTypeError: for data of another kind, and for ids that are not integers.
        InvalidValueError: for a name that has no file or folder, and for a list that mixes kinds.
    """
    if isinstance(data, Corpus):
        return data
    if isinstance(data, (str, Path, Source)):
        return _named([data], field, split)
    if isinstance(data, (mx.array, np.ndarray)):
        return Corpus.from_ids(as_token_ids(data).reshape(-1))
    if not isinstance(data, Sequence):
        raise InvalidTypeError(f"Training data are names, texts, token ids or a Corpus, not {type(data).__name__}.")
    if not data:
        raise InvalidValueError("There are no training data. Name a file, a folder or a data set of the hub, or give texts or token ids.")
    if all(map(_is_conversation, data)):
        return [ChatList([data] if all("role" in entry for entry in data) else data)]
    textual = [isinstance(entry, (str, Path, Source)) for entry in data]
    if not any(textual):
        return Corpus.from_ids(joined_ids(data))
    return _names_or_texts(data, textual, field, split)


def _names_or_texts(data: Sequence[Any], textual: Sequence[bool], field: str, split: str) -> list[Source]:
    """Return the sources of a list of names, or of texts; `textual` tells which entries are one of both."""
    if not all(textual):
        raise InvalidTypeError("Training data mix text and token ids. Give either names and texts, or token ids.")
    kinds = [_kind_of(entry) for entry in data]
    if "text" not in kinds:
        return _named(data, field, split)
    if "name" in kinds:
        raise InvalidValueError(
            f"Training data mix texts and names: {str(data[kinds.index('name')])!r} names a file, a folder or a data set of the hub, "
            f"{_shortened(data[kinds.index('text')])} is a text. Give one or the other."
        )
    return [TextList(data)]


def _is_conversation(entry: Any) -> bool:
    """Tell whether an entry of a list is a conversation: a record, or a list of messages."""
    return isinstance(entry, Mapping) or (isinstance(entry, Sequence) and bool(entry) and isinstance(entry[0], Mapping))


def _kind_of(entry: str | Path | Source) -> Literal["name", "text", "word"]:
    if not isinstance(entry, str) or entry.startswith(HUB):
        return "name"
    if not entry or "\0" in entry or any(len(part.encode("utf-8", "replace")) > LONGEST_FILE_NAME for part in entry.split("/")):
        return "text"
    if entry.lower().endswith(SUFFIXES) or _exists(entry):
        return "name"
    return "word" if entry.split() == [entry] else "text"


def joined_ids(rows: Sequence[Any]) -> np.ndarray:
    """Return token ids, or several lists and arrays of them, as one array [tokens]."""
    if all(isinstance(row, (int, np.integer)) for row in rows):
        return as_token_ids(rows)
    return np.concatenate([as_token_ids(row).reshape(-1) for row in rows if len(row)] or [np.zeros(0, np.int64)])


def _named(names: Sequence[str | Path | Source], field: str, split: str) -> list[Source]:
    """Return the sources of names. A string is a path unless it begins with 'hf:'."""
    places: list[str | Path | Source] = []
    for name in names:
        if not isinstance(name, str) or name.startswith(HUB):
            places.append(name)
        elif _exists(name):
            places.append(Path(name))
        else:
            as_text = " To train on the text itself, give it in a list: [text]." if name.split() != [name] else ""
            raise InvalidValueError(f"There is no file or folder {_shortened(name)}. Check the path.{as_text}")
    return find_sources(places, field=field, split=split)


def _exists(name: str) -> bool:
    try:
        return bool(name.strip()) and Path(name).expanduser().exists()
    except (OSError, ValueError):
        return False


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
