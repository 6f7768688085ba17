"""Read texts through a lens into trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, LogitLens, as_lens, lens_kind, untranslated_layers
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.models.layers import layers_in_order
from metalens.models.tokenization import TokenInput, as_token_ids
from metalens.models.unembed import NO_NORM, NormFunction
from metalens.ops.stats import check_top_k
from metalens.readings.cells_reader import Request, part_cells, read_cells, split_rows
from metalens.readings.chosen_tokens import token_ids_of
from metalens.readings.rows import select_layers, select_position
from metalens.readings.source import RowSource, parts_of
from metalens.readings.statistics import Cells, cell_arrays, join_cells
from metalens.readings.texts import Texts, are_several
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_data import token_texts
from metalens.utils.errors import InvalidTypeError, InvalidValueError


class TrajectoryOptions(TypedDict, total=False):
    """The options of `read_trajectory`."""

    top_k: int
    layers: Sequence[int] | None
    embedding: bool
    position: int | None
    targets: Sequence[Any] | mx.array | None
    anti_targets: Sequence[Any] | mx.array | None
    tokens: Sequence[str | int]
    mask_input: bool
    compare: bool
    final_norm: NormFunction | None
    skip_norm: bool


@overload
def read_trajectory(
    model: LanguageModel, text: TokenInput, lens: Lens | str | Path | None = None, **options: Unpack[TrajectoryOptions]
) -> Trajectory: ...
@overload
def read_trajectory(
    model: LanguageModel, text: Texts, lens: Lens | str | Path | None = None, **options: Unpack[TrajectoryOptions]
) -> list[Trajectory]: ...
def read_trajectory(
    model: LanguageModel,
    text: TokenInput | Texts,
    lens: Lens | str | Path | None = None,
    *,
    top_k: int = 10,
    layers: Sequence[int] | None = None,
    embedding: bool = False,
    position: int | None = None,
    targets: Sequence[Any] | mx.array | None = None,
    anti_targets: Sequence[Any] | mx.array | None = None,
    tokens: Sequence[str | int] = (),
    mask_input: bool = False,
    compare: bool = True,
    final_norm: NormFunction | None = None,
    skip_norm: bool = False,
) -> Trajectory | list[Trajectory]:
    """Read a text, or several, through a lens: every statistic of every layer at every position.

    All statistics come from one pass over the unembedding, which holds no logits. A long text is read in parts, with the
    model's own cache, so that memory does not grow with it: the parts equal one pass within rounding.

    Args:
        model: the model.
        text: a string, a list of token ids, or an array of ids [T] or [B, T], of which row 0 is read; or a list of
            texts.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None =
            the logit lens.
        top_k: most likely tokens to keep of each cell, 1 to V.
        layers: layer numbers, negative from the end; None = all. Layer i is the output of block i.
        embedding: also read the embedding's output, as the first row. A tuned lens reads it through the translator that
            tuned-lens's files have for it; other lenses as the logit lens does.
        position: the only position to read, negative from the end; None = all.
        targets: [T] token ids, one for each position of the text, -1 = none, that cross_entropy and rank are about. None = the
            next tokens; with mask_input none, because the next tokens are ruled out. For several texts one entry for each.
        anti_targets: [T] token ids; adds log_prob_difference, log p(target) - log p(anti-target). As `targets`.
        tokens: tokens, as texts or ids, whose probability and rank every cell gets.
        mask_input: rule out the tokens of the text in every prediction, also in the model's own.
        compare: compare with the model's own prediction: kl, reverse_kl and agrees.
        final_norm: a function that replaces the model's final norm in the lens.
        skip_norm: read without a norm.

    Returns:
        a `Trajectory`; for a list of texts a list of them.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an empty text, ids outside the vocabulary, an unknown layer or none, a position or top_k
            out of range, targets of another length, a chosen text that is no single token, a lens of another model, NaN in the
            logits, and a model whose own logits its norm and head do not reproduce.
        InvalidTypeError: if the text is no text, or the lens no lens.
    """
    prepared, several = _prepared(
        model, text, [lens], top_k, layers, embedding, position, targets, anti_targets, tokens, mask_input, compare, final_norm, skip_norm
    )
    found = [trajectory for sources, request in prepared for trajectory in read_sources(sources, request)]
    return found if several else found[0]


def read_trajectory_parts(
    model: LanguageModel,
    text: TokenInput,
    lens: Lens | str | Path | None = None,
    *,
    part_size: int | None = None,
    **options: Unpack[TrajectoryOptions],
) -> Iterator[Trajectory]:
    """Read one text through a lens, and yield one part of its positions after another. The arguments are checked at once.

    Between two parts a caller can show progress, or stop. `join_trajectories` joins the parts to the trajectory that
    `read_trajectory` returns.

    Args:
        model, text, lens, options: as in `read_trajectory`.
        part_size: positions of a part, at least 1; the last one may have fewer. None = as many as a bounded memory
            allows. A model without a cache is read in one part.

    Raises:
        InvalidValueError, InvalidTypeError, FileNotFoundError: as `read_trajectory`, and for a part_size below 1.
    """
    sources, request = one_text(model, text, [lens], options)
    return (trajectory for (trajectory,), _ in source_parts(sources, request, checked_part_size(part_size)))


def one_text(
    model: LanguageModel, text: TokenInput, lenses: Sequence[Lens | str | Path | None], options: TrajectoryOptions
) -> tuple[list[RowSource], Request]:
    """Return what to read in one text, through one lens or several: their sources, and the statistics.

    Raises:
        InvalidValueError, InvalidTypeError, FileNotFoundError: as `read_trajectory`, and for several texts or an unknown option.
    """
    if are_several(text):
        raise InvalidTypeError("One text is read here, not a list of texts.")
    given = {**_DEFAULTS, **options}
    if unknown := given.keys() - _DEFAULTS.keys():
        raise InvalidTypeError(f"read_trajectory has no option {', '.join(sorted(unknown))}; it has {', '.join(_DEFAULTS)}.")
    (found,), _ = _prepared(model, text, lenses, *given.values())
    return found


def checked_part_size(size: int | None) -> int | None:
    """Return the positions of a part (InvalidValueError if they are fewer than 1)."""
    if size is not None and size < 1:
        raise InvalidValueError(f"part_size must be at least 1, got {size}.")
    return size


def read_sources(sources: Sequence[RowSource], request: Request) -> list[Trajectory]:
    """Return the trajectories of the lenses that read one text."""
    cells = read_cells(sources, request)
    return [assemble(source, request, *each) for source, each in zip(sources, cells, strict=True)]


def source_parts(sources: Sequence[RowSource], request: Request, size: int | None) -> Iterator[tuple[list[Trajectory], list[mx.array]]]:
    """Yield for one part of the positions after another the trajectories of the lenses that read one text, and their rows [R, c, D]."""
    start = 0
    for rows, own in parts_of(sources, size):
        where = slice(start, start + own.shape[0])
        cells = split_rows(sources, part_cells(sources, request, rows, own, start))
        here, asked = [source.select(source.layers, source.positions[where]) for source in sources], request.part(where)
        yield [assemble(source, asked, *each) for source, each in zip(here, cells, strict=True)], rows
        start = where.stop


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """Join neighboring parts of one text, in order.

    Raises:
        InvalidValueError: if there is no part, a part does not follow the one before, or the parts come from different models, lenses,
            texts or options.
    """
    if not parts:
        raise InvalidValueError("There is no trajectory to join.")
    for before, after in pairwise(parts):
        if after.first_position != before.positions.stop:
            raise InvalidValueError(
                "These trajectories are not neighboring parts of one text: "
                f"position {before.positions.stop - 1} is followed by position {after.first_position}."
            )
        if different := _differences(before, after):
            raise InvalidValueError(
                f"These trajectories are not neighboring parts of one text: they differ in {', '.join(different)}. Read all with the same arguments."
            )

    def joined(name: str) -> np.ndarray | None:
        return None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])

    ids: dict[str, Any] = {name: joined(name) for name in ("token_ids", "target_ids", "anti_target_ids")}
    first, source = parts[0], None if any(part.source is None for part in parts) else parts[-1].source  # it has the whole of a growing text
    positions = range(first.first_position, parts[-1].positions.stop)
    return replace(
        first,
        **cell_arrays(join_cells([part.cells() for part in parts])),
        **ids,
        texts={i: text for part in parts for i, text in part.texts.items()},
        model=join_cells([part.model for part in parts]),
        source=None if source is None else source.select(source.layers, positions),
    )


def _differences(a: Trajectory, b: Trajectory) -> list[str]:
    """Return what two parts of one trajectory cannot differ in, and these do."""
    names = ("layers", "chosen_ids", "lens", "untranslated", "mask_input", "model_name", "num_layers", "vocab_size")
    found = [name for name in names if getattr(a, name) != getattr(b, name)]
    if a.top_ids.shape[-1] != b.top_ids.shape[-1]:
        found.append("top_k")
    if cell_arrays(a).keys() != cell_arrays(b).keys():
        found.append("statistics")
    if a.source is None or b.source is None:
        return found
    if a.source.model is not b.source.model:
        found.append("model")
    if not (a.source.lens is b.source.lens or (isinstance(a.source.lens, LogitLens) and isinstance(b.source.lens, LogitLens))):
        found.append("lens")
    if a.source.norm is not b.source.norm:
        found.append("final norm")
    length = min(a.source.ids.shape[1], b.source.ids.shape[1])  # a text that is generated grows
    if not mx.array_equal(a.source.ids[:, :length], b.source.ids[:, :length]).item():
        found.append("text")
    return [*dict.fromkeys(found)]


def _prepared(
    model: LanguageModel,
    text: Any,
    lenses: Sequence[Lens | str | Path | None],
    top_k: int,
    layers: Sequence[int] | None,
    embedding: bool,
    position: int | None,
    targets: Any,
    anti_targets: Any,
    tokens: Sequence[str | int],
    mask_input: bool,
    compare: bool,
    final_norm: NormFunction | None,
    skip_norm: bool,
) -> tuple[list[tuple[list[RowSource], Request]], bool]:
    """Check the arguments of `read_trajectory`. Return for each text its sources, one for each lens, and the statistics; whether texts are several.

    Raises:
        InvalidValueError, InvalidTypeError, FileNotFoundError: as `read_trajectory`, and if there is no lens.
    """
    read_by = checked_lenses(model, lenses)
    vocabulary = model.unembed.head.tokens
    check_top_k(top_k, vocabulary)
    norm = NO_NORM if skip_norm else model.unembed.norm if final_norm is None else final_norm
    blocks = select_layers(layers, model.num_layers)
    rows = tuple(layers_in_order(blocks, embedding))
    if not rows:
        raise InvalidValueError("No layers were asked for. Pass layers=None for all of them.")
    chosen = token_ids_of(model, tokens)
    several = are_several(text)
    texts = list(text) if several else [text]
    pairs = zip(_of_each(targets, texts, several, "targets"), _of_each(anti_targets, texts, several, "anti_targets"), strict=True)
    found = []
    for each, (own_targets, own_anti) in zip(texts, pairs, strict=True):
        ids = model.ids(each)[:1]
        where = select_position(position, ids.shape[1])
        sources = [RowSource(model, ids, lens, norm, rows, range(ids.shape[1])[where], mask_input) for lens in read_by]
        target_ids = _targets(own_targets, ids, vocabulary, mask_input)
        anti_ids = None if own_anti is None else _target_ids(own_anti, ids, vocabulary, "anti_targets")
        if anti_ids is not None and target_ids is None:
            raise InvalidValueError("anti_targets are compared with targets; with mask_input there are none by default. Pass targets too.")
        found.append((sources, Request(top_k, target_ids, anti_ids, chosen, compare).part(where)))
    return found, several


def checked_lenses(model: LanguageModel, lenses: Sequence[Lens | str | Path | None]) -> list[Lens]:
    """Return lenses that fit a model, from what callers name them by.

    Raises:
        FileNotFoundError: if there is no lens at a path.
        InvalidValueError: if there is no lens at all, or one is of another model.
        InvalidTypeError: if one is no lens, or they are no list.
    """
    if isinstance(lenses, (str, Path)) or not isinstance(lenses, Sequence):
        raise InvalidTypeError(f"lenses must be a list of lenses like [None, lens], got {lenses!r:.100}.")
    if not lenses:
        raise InvalidValueError("There is no lens to read with. Give [None] for the logit lens.")
    found = [as_lens(lens) for lens in lenses]
    for lens in found:
        check_lens(lens, model)
    return found


def assemble(source: RowSource, request: Request, lens: Cells, own: Cells) -> Trajectory:
    """Return the trajectory of cells that a source gave."""
    model, positions = source.model, source.positions
    token_ids = np.array(source.ids[0])[positions.start : positions.stop]
    texts = token_texts(model, token_ids, lens.top_ids, own.top_ids, request.targets, request.anti_targets, np.array(request.chosen, np.int32))
    return Trajectory(
        **vars(lens),
        layers=source.layers,
        token_ids=token_ids,
        target_ids=request.targets,
        anti_target_ids=request.anti_targets,
        chosen_ids=request.chosen,
        texts=texts,
        first_position=positions.start,
        lens=lens_kind(source.lens),
        untranslated=untranslated_layers(source.lens, source.layers),
        mask_input=source.mask_input,
        model_name=None if model.name is None else str(model.name),
        num_layers=model.num_layers,
        vocab_size=model.unembed.head.tokens,
        model=own,
        source=source,
    )


def _of_each(given: Any, texts: list[Any], several: bool, name: str) -> list[Any]:
    """Return the targets of each text."""
    if given is None or not several:
        return [given] * len(texts)
    if isinstance(given, mx.array) or len(given) != len(texts):
        raise InvalidValueError(f"{name} must have one entry for each of the {len(texts)} texts, a list of lists of ids.")
    return list(given)


def _targets(given: Any, ids: mx.array, tokens: int, mask_input: bool) -> np.ndarray | None:
    if given is not None:
        return _target_ids(given, ids, tokens, "targets")
    return None if mask_input else np.append(np.array(ids[0, 1:]), -1).astype(np.int32)


def _target_ids(given: Any, ids: mx.array, tokens: int, name: str) -> np.ndarray:
    found = as_token_ids(given)
    if found.dtype.kind not in "iu":
        raise InvalidTypeError(f"{name} must be integers, got {found.dtype}.")
    if found.shape != (ids.shape[1],):
        raise InvalidValueError(f"{name} must have one id for each of the {ids.shape[1]} tokens of the text, got {list(found.shape)}.")
    wrong = found[(found < -1) | (found >= tokens)]
    if wrong.size:
        raise InvalidValueError(f"{name} must be tokens from 0 to {tokens - 1}, or -1 for none; {int(wrong[0])} is neither.")
    return found.astype(np.int32)


# {option of read_trajectory: its default}, in the order of _prepared's arguments
_DEFAULTS = {name: option.default for name, option in signature(read_trajectory).parameters.items() if option.kind is option.KEYWORD_ONLY}
