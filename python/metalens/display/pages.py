"""Readings as a page: the viewer with its numbers in one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metalens.lenses.lens import Lens
from metalens.model import InterpretableModel
from metalens.models.tokenization import TokenInput
from metalens.readings import Comparison, join_lenses_parts, read_lenses_in_parts, read_trajectory
from metalens.readings.export import comparison_json
from metalens.readings.trajectory_reader import TrajectoryOptions
from metalens.viewer.page import TextAndLens, document, page


def reading_page(
    model: InterpretableModel,
    texts: Sequence[TokenInput],
    lens: Lens | None = None,
    *,
    title: str = "",
    tokens: Sequence[str | int] = (),
    top_k: int = 8,
    compare_layers: bool = False,
    embedding: bool = False,
) -> str:
    """Return one or two texts, read through the logit lens and a tuned one, as a complete HTML page.

    Args:
        model: the model.
        texts: one text, or two to compare.
        lens: the lens beside the logit lens; None = the logit lens alone.
        title: name of the model on the page.
        tokens: tokens, as texts or ids, whose curves the page has everywhere. The model's answer at the end of each text is always one.
        top_k: most likely tokens of each cell, at most the vocabulary.
        compare_layers: also compare every layer with the next one, which takes longer than all the rest.
        embedding: also show the embedding's output, as the first layer.

    Raises:
        InvalidValueError, InvalidTypeError: as `read_trajectory`.
    """
    lenses: list[Lens | None] = [None] if lens is None else [None, lens]
    top_k = min(top_k, model.unembed.head.tokens)
    answers = [int(read_trajectory(model, text, None, top_k=1, layers=[-1], position=-1).model.top_ids[0, 0, 0]) for text in texts]
    options: TrajectoryOptions = {"top_k": top_k, "tokens": list(dict.fromkeys([*tokens, *answers])), "embedding": embedding}
    read = [join_lenses_parts([*read_lenses_in_parts(model, text, lenses, compare_lenses=True, **options)]) for text in texts]
    found = [
        {"name": name, "trajectories": [each.to_json(compact=True) for each in of_text.trajectories]}
        for name, of_text in zip("AB", read, strict=False)
    ]
    compared = [
        comparison_of(comparison, *pair)
        for text, of_text in enumerate(read)
        for pair, comparison in zip(lenses_compared(text, len(lenses)), of_text.comparisons, strict=True)
    ]
    if len(read) == 2 and len(read[0].trajectories[0]) == len(read[1].trajectories[0]):
        both = zip(*(of_text.trajectories for of_text in read), strict=True)
        compared += [comparison_of(a.compare(b), (0, lens), (1, lens)) for lens, (a, b) in enumerate(both)]
    if compare_layers:
        compared += [
            comparison_of(each.compare_layers(), (text, lens), (text, lens))
            for text, of_text in enumerate(read)
            for lens, each in enumerate(of_text.trajectories)
        ]
    return page(document(found, title or "metalens", compared))


def lenses_compared(text: int, count: int) -> list[tuple[TextAndLens, TextAndLens]]:
    """Return which lenses a page compares on a text: each but the first with the first one.

    Args:
        text: number of the text.
        count: number of lenses.
    """
    return [((text, lens), (text, 0)) for lens in range(1, count)]


def comparison_of(comparison: Comparison, a: TextAndLens, b: TextAndLens) -> dict[str, Any]:
    """Return a comparison as a page's document holds it.

    Args:
        comparison: the comparison.
        a, b: what it compares. The same twice = every layer with the next one.
    """
    return {**comparison_json(comparison, compact=True, trajectories=False), "of": [[*a], [*b]]}
