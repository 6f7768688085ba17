"""The text of an analysis: cut into sequences, read into hidden states, and told from other texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

import mlx.core as mx
import numpy as np

from metalens.evaluation.text import EvaluationText, Sequences
from metalens.models.language_model import LanguageModel
from metalens.utils.errors import InvalidValueError


def sequences_of(
    model: LanguageModel, text: EvaluationText, *, max_seq_len: int | None = None, max_tokens: int | None = None, bos: bool = True
) -> list[mx.array]:
    """Return the sequences of a text, as `metalens.evaluate` cuts them.

    Args:
        model: the model.
        text: as in `metalens.evaluate`.
        max_seq_len: tokens per sequence, at least 2; None = 512, or the model's context if that is shorter.
        max_tokens: tokens to read from the start; None = all.
        bos: begin each sequence with the tokens that the tokenizer puts before a text.

    Returns:
        checked ids [T] of each sequence.

    Raises:
        InvalidValueError: if the text is empty or a setting is out of range.
        InvalidTypeError: if the text is no text.
    """
    length = model.default_sequence_length if max_seq_len is None else max_seq_len
    if length < 2 or (max_tokens is not None and max_tokens < 2):
        raise InvalidValueError(f"max_seq_len and max_tokens must be at least 2, got {length} and {max_tokens}.")
    found = list(Sequences(model, text, length, max_tokens, bos))
    if not found:
        raise InvalidValueError("The text has no tokens. Give a text that is not empty.")
    return found


def equal_sequences(model: LanguageModel, text: EvaluationText, length: int, count: int, *, at_least: int = 1, bos: bool = True) -> mx.array:
    """Return the first sequences of a text that have exactly this length, as one array [B, length].

    Args:
        model: the model.
        text: as in `metalens.evaluate`. It is read no further than needed.
        length: tokens per sequence.
        count: most sequences to return.
        at_least: number of sequences that there must be.
        bos: begin each sequence with the tokens that the tokenizer puts before a text.

    Raises:
        InvalidValueError: if there are fewer than `at_least` of them.
    """
    found = list(islice((ids for ids in Sequences(model, text, length, None, bos) if ids.size == length), count))
    if len(found) < at_least:
        raise InvalidValueError(
            f"The text has {len(found)} sequences of {length} tokens; at least {at_least} are needed. Give a longer text, or shorter sequences."
        )
    return mx.stack(found)


def hidden_rows(model: LanguageModel, sequences: Sequence[mx.array], layers: Sequence[int]) -> dict[int, mx.array]:
    """Return the outputs of some blocks at all positions of the sequences: {block: [N, D] float32}, evaluated.

    Args:
        model: the model.
        sequences: ids [T] of each sequence.
        layers: the blocks.
    """
    parts: dict[int, list[mx.array]] = {layer: [] for layer in layers}
    for ids in sequences:
        states = model.source.capture(ids[None])
        rows = [states.hidden[layer][0].astype(mx.float32) for layer in layers]
        mx.eval(rows)
        for layer, row in zip(layers, rows, strict=True):
            parts[layer].append(row)
    found = {layer: mx.concatenate(rows) for layer, rows in parts.items()}
    mx.eval(found)
    return found


def text_hash(sequences: Iterable[mx.array]) -> str:
    """Return the SHA-256 of the ids and lengths of sequences, in hexadecimal digits."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.array(ids).astype("<i4").tobytes())
    return digest.hexdigest()
