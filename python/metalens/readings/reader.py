"""Read texts through a lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from metalens.lenses.lens import Lens
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.models.unembed import NormFunction
from metalens.readings.reading import Reading
from metalens.readings.texts import Texts
from metalens.readings.trajectory_reader import read_trajectory


@overload
def read(
    model: LanguageModel,
    text: TokenInput,
    lens: Lens | str | Path | None = None,
    top_k: int = 1,
    layers: Sequence[int] | None = None,
    position: int | None = None,
    final_norm: NormFunction | None = None,
    skip_norm: bool = False,
    embedding: bool = False,
) -> Reading: ...
@overload
def read(
    model: LanguageModel,
    text: Texts,
    lens: Lens | str | Path | None = None,
    top_k: int = 1,
    layers: Sequence[int] | None = None,
    position: int | None = None,
    final_norm: NormFunction | None = None,
    skip_norm: bool = False,
    embedding: bool = False,
) -> list[Reading]: ...
def read(
    model: LanguageModel,
    text: TokenInput | Texts,
    lens: Lens | str | Path | None = None,
    top_k: int = 1,
    layers: Sequence[int] | None = None,
    position: int | None = None,
    final_norm: NormFunction | None = None,
    skip_norm: bool = False,
    embedding: bool = False,
) -> Reading | list[Reading]:
    """Read a text, or several, through a lens: predictions, statistics, and the model's own prediction beside them.

    Args:
        model: the model.
        text: a string, a list of token ids, or an array of ids [T] or [B, T], of which row 0 is read; or a list of
            texts.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None =
            the logit lens.
        top_k: predictions per position, 1 to V.
        layers: layer numbers, negative from the end; None = all. Layer i is the output of block i.
        position: the only token to read, negative from the end; None = all.
        final_norm: a function that replaces the model's final norm.
        skip_norm: decode without a norm.
        embedding: also read the embedding's output, as in `read_trajectory`.

    Returns:
        a `Reading`; for a list of texts a list of them, each equal to the reading of that text alone.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an empty text, ids outside the vocabulary, an unknown layer or none, a position or top_k
            out of range, a lens of another model, and a model whose own logits its norm and head do not reproduce.
        InvalidTypeError: if the text is no text, or the lens no lens.
    """
    found = read_trajectory(
        model,
        text,
        lens,
        top_k=top_k,
        layers=layers,
        embedding=embedding,
        position=position,
        compare=False,
        final_norm=final_norm,
        skip_norm=skip_norm,
    )
    return [Reading(each) for each in found] if isinstance(found, list) else Reading(found)
