"""Readings as a page: the viewer with its numbers in one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metalens.lenses.lens import Lens
from metalens.model import InterpretableModel
from metalens.models.tokenization import TokenInput
from metalens.readings import Trajectory, read_trajectory
from metalens.readings.export import comparison_json
from metalens.viewer.page import document, page


def reading_page(
    model: InterpretableModel,
    texts: Sequence[TokenInput],
    lens: Lens | None = None,
    *,
    title: str = "",
    tokens: Sequence[str | int] = (),
    top_k: int = 8,
) -> str:
    """Return one or two texts, read through the logit lens and a tuned one, as a complete HTML page.

    Args:
        model: the model.
        texts: one text, or two to compare.
        lens: the lens beside the logit lens; None = the logit lens alone.
        title: name of the model on the page.
        tokens: tokens, as texts or ids, whose curves the page has everywhere. The model's answer at the end of each text is always one.
        top_k: most likely tokens of each cell, at most the vocabulary.

    Raises:
        InvalidValueError, InvalidTypeError: as `read_trajectory`.
    """
    lenses: list[Lens | None] = [None] if lens is None else [None, lens]
    top_k = min(top_k, model.unembed.head.tokens)
    answers = [int(read_trajectory(model, text, None, top_k=1, layers=[-1], position=-1).model.top_ids[0, 0, 0]) for text in texts]
    followed = list(dict.fromkeys([*tokens, *answers]))
    trajectories = [[read_trajectory(model, text, each, top_k=top_k, tokens=followed) for each in lenses] for text in texts]
    found = [
        {"name": name, "trajectories": [each.to_json(compact=True) for each in of_text]} for name, of_text in zip("AB", trajectories, strict=False)
    ]
    return page(document(found, title or "metalens", comparisons(trajectories)))


def comparisons(trajectories: Sequence[Sequence[Trajectory]]) -> list[dict[str, Any]]:
    """Return how far lenses are apart on each text, and two texts of one length through each lens, as a page's document holds it.

    Args:
        trajectories: one list for each text, with one trajectory for each lens.
    """
    return [
        comparison_of(trajectories[a[0]][a[1]], trajectories[b[0]][b[1]], a, b)
        for a, b in comparable([[len(t) for t in each] for each in trajectories])
    ]


def comparable(lengths: Sequence[Sequence[int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the pairs (text, lens), (text, lens) that a page compares: the second lens with the first one, and texts of one length.

    Args:
        lengths: the number of tokens, for each text and lens.
    """
    pairs = [((text, 1), (text, 0)) for text, of_text in enumerate(lengths) if len(of_text) > 1]
    if len(lengths) == 2 and lengths[0][0] == lengths[1][0]:
        pairs += [((0, lens), (1, lens)) for lens in range(len(lengths[0]))]
    return pairs


def comparison_of(first: Trajectory, second: Trajectory, a: tuple[int, int], b: tuple[int, int]) -> dict[str, Any]:
    """Return how far two trajectories are apart, as a page's document holds it.

    Args:
        first, second: the trajectories.
        a, b: the numbers of their text and their lens.
    """
    return {**comparison_json(first.compare(second), compact=True, trajectories=False), "of": [[*a], [*b]]}
