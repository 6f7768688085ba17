"""Read texts through a lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, overload

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, as_lens, lens_kind, untranslated_layers
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.models.unembed import NO_NORM, NormFunction
from metalens.ops import lens_stats
from metalens.ops.stats import logits_stats
from metalens.readings.reading import Reading
from metalens.readings.rows import lens_rows, require_finite, select_layers, select_position
from metalens.readings.top_tokens import predictions_of
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError

# Several texts: a list of strings, of lists of ids, or of arrays of ids [T].
Texts: TypeAlias = list[str] | tuple[str, ...] | list[list[int]] | list[mx.array]


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

    Returns:
        a `Reading`; for a list of texts a list of them, each equal to the reading of that text alone.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an empty text, ids outside the vocabulary, an unknown layer or none, a position or top_k
            out of range, a lens of another model, and a model whose own logits its norm and head do not reproduce.
        InvalidTypeError: if the text is no text, or the lens no lens.
    """
    lens = as_lens(lens)
    check_lens(lens, model)
    norm = NO_NORM if skip_norm else model.unembed.norm if final_norm is None else final_norm
    chosen = select_layers(layers, model.num_layers)
    if not chosen:
        raise InvalidValueError("No layers were asked for. Pass layers=None for all of them.")
    if are_several(text):
        return [_read(model, each, lens, norm, chosen, top_k, position) for each in text]
    return _read(model, text, lens, norm, chosen, top_k, position)


def _read(model: LanguageModel, text: Any, lens: Lens, norm: NormFunction, layers: list[int], top_k: int, position: int | None) -> Reading:
    ids = model.ids(text)[:1]
    where = select_position(position, ids.shape[1])
    captured = model.source.capture(ids)
    hidden = [h[0, where] for h in captured.hidden]
    stats = lens_stats(lens_rows(hidden, layers, lens, norm), model.unembed.head, top_k)
    own = logits_stats(captured.logits[:1, where].astype(mx.float32))
    require_finite(stats)
    strings = model.token_strings(mx.concatenate([ids[0, where], stats.top_ids.reshape(-1), own.top_ids.reshape(-1)]))
    token_ids = to_list(ids[0, where])
    return Reading(
        layers=layers,
        tokens=[strings[i] for i in token_ids],
        predictions=predictions_of(stats, layers, strings),
        stats=stats,
        model=own,
        model_tokens=[strings[i] for i in to_list(own.top_ids[0, :, 0])],
        token_ids=token_ids,
        lens=lens_kind(lens),
        num_layers=model.num_layers,
        untranslated=untranslated_layers(lens),
    )


def are_several(text: TokenInput | Texts) -> TypeGuard[Texts]:
    """Return whether the input is a list of texts. An array of ids is one text, also [B, T]."""
    return isinstance(text, (list, tuple)) and len(text) > 0 and all(_is_text(each) for each in text)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, list, tuple)) or (isinstance(value, (mx.array, np.ndarray)) and value.ndim > 0)
