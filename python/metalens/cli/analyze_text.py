"""The text that an analysis reads: its options, and the corpus that they name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from metalens.cli.common import bos_option, data_options, sources_of

if TYPE_CHECKING:
    from metalens.model import InterpretableModel
    from metalens.training.data import Corpus
else:
    InterpretableModel = Corpus = Any  # take a while to import

F = TypeVar("F", bound=Callable[..., Any])


def text_options(max_seq_len: int, max_tokens: int | None = None) -> Callable[[F], F]:
    """Add --data, --field, --split, --max-seq-len, --no-bos and, if it has a default, --max-tokens.

    Args:
        max_seq_len: default of --max-seq-len.
        max_tokens: default of --max-tokens. None = the command has no such option.
    """

    def add(command: F) -> F:
        command = bos_option(command)
        command = click.option("--max-seq-len", type=click.IntRange(min=2), default=max_seq_len, show_default=True, help="Tokens per sequence.")(
            command
        )
        if max_tokens is not None:
            command = click.option(
                "--max-tokens", type=click.IntRange(min=2), default=max_tokens, show_default=True, help="Number of tokens to read."
            )(command)
        return data_options(required=True, split="test")(command)

    return add


def opened_text(
    model: InterpretableModel, data: tuple[str, ...], field: str, split: str, max_tokens: int | None, join: Literal["packed", "eos"] = "packed"
) -> Corpus:
    """Return the start of the text that --data names, or all of it.

    Args:
        model: the model, whose tokenizer reads it.
        data: names of --data.
        field: name of --field.
        split: name of --split.
        max_tokens: tokens to read. None = all.
        join: "packed" = no sequence crosses the end of a document; "eos" = every sequence is full.
    """
    from metalens.training.data import open_corpus

    return open_corpus(sources_of(data), model.tokenizer, field=field, join=join, split=split, max_tokens=max_tokens)
