"""The text that an analysis reads: its options, which a command gets as one object, and the corpus that they name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from metalens.cli.analyze_options import gathered, with_options
from metalens.cli.common import bos_option, data_options, sources_of

if TYPE_CHECKING:
    from metalens.model import InterpretableModel
    from metalens.training.data import Corpus
else:
    InterpretableModel = Corpus = Any  # take a while to import

F = TypeVar("F", bound=Callable[..., Any])

# {parameter: spelling} of the options that name no text themselves.
ABOUT_THE_TEXT = {"field": "--field", "split": "--split", "max_tokens": "--max-tokens", "max_seq_len": "--max-seq-len", "no_bos": "--no-bos"}


@dataclass(frozen=True)
class TextOptions:
    """The text of --data, read as `metalens eval` reads it.

    Attributes:
        data, field, split: the names of the text, its field or column, and the split of hub data sets.
        max_seq_len: tokens per sequence.
        no_bos: leave out the tokens that the tokenizer puts before a text.
        max_tokens: tokens to read; None = all.
    """

    data: tuple[str, ...]
    field: str
    split: str
    max_seq_len: int
    no_bos: bool
    max_tokens: int | None = None

    @property
    def inputs(self) -> list[Path]:
        """Return the names as paths, so that no output replaces them."""
        return [Path(name) for name in self.data]

    @property
    def settings(self) -> dict[str, Any]:
        """Return how the text is cut, as the functions of `metalens.analysis` take it."""
        return {"max_seq_len": self.max_seq_len, "bos": not self.no_bos}

    def corpus(self, model: InterpretableModel, max_tokens: int | None = None) -> Corpus:
        """Return the text, at least its first tokens.

        Args:
            model: the model, whose tokenizer reads it.
            max_tokens: tokens that will be read. None = `max_tokens`.
        """
        from metalens.training.data import find_sources, open_held_out

        sources = find_sources(sources_of(self.data), field=self.field, split=self.split)
        return open_held_out(sources, model.tokenizer, max_tokens=self.max_tokens if max_tokens is None else max_tokens, to_the_end=False)

    def sequences(self, model: InterpretableModel) -> list[Any]:
        """Return the sequences of the text: ids [T] of each."""
        from metalens.analysis import sequences_of

        return sequences_of(model, self.corpus(model), max_tokens=self.max_tokens, **self.settings)


def text_options(max_seq_len: int, max_tokens: int | Literal["all"] | None = None, *, required: bool = True) -> Callable[[F], F]:
    """Add the options of TextOptions, which the command gets as `text`.

    Args:
        max_seq_len: default of --max-seq-len.
        max_tokens: default of --max-tokens. None = the command has no such option.
        required: whether --data must be given.
    """
    limited = isinstance(max_tokens, int)
    tokens = click.option(
        "--max-tokens",
        type=click.IntRange(min=2),
        default=max_tokens if limited else None,
        show_default=limited,
        help="Number of tokens to read." + ("" if limited else "  [default: all]"),
    )
    length = click.option("--max-seq-len", type=click.IntRange(min=2), default=max_seq_len, show_default=True, help="Tokens per sequence.")
    added = [data_options(required=required, split="test"), *([] if max_tokens is None else [tokens]), length, bos_option]
    return lambda command: with_options(added, gathered(TextOptions, "text", command))
