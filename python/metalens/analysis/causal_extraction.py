"""Causal basis extraction: the directions of the residual stream that a lens's prediction depends on most.

Direction j of a layer is the unit vector, orthogonal to the directions before it, whose ablation moves the prediction furthest
(Belrose et al. 2023, section 4.1). The problem is not convex: the search begins at the best of several starts, and finds a local maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from metalens.analysis.ablation import AblationMode
from metalens.analysis.causal_basis import CausalBasis, basis_path, stored_basis
from metalens.analysis.lens_energy import LensEnergy
from metalens.analysis.sequences import hidden_rows, sequences_of, text_hash
from metalens.analysis.sphere import Maximum, Value, maximize_on_sphere, unit, without
from metalens.evaluation.text import EvaluationText
from metalens.lenses.lens import Lens, TunedLens, as_lens, lens_kind
from metalens.lenses.provenance import check_lens, translator_hash
from metalens.models.language_model import LanguageModel
from metalens.readings.rows import select_layers
from metalens.utils.errors import InvalidValueError

DEFAULT_TOKENS = 512  # positions that energies are means over

# Yields the directions whose energy it needs, and returns the whole basis.
_LayerSearch: TypeAlias = Generator[np.ndarray, Value, CausalBasis]


@dataclass(frozen=True)
class SearchOptions:
    """How each direction is searched.

    Attributes:
        starts: number of starting points. The search goes on from the best. Half of them are principal directions of what an ablation
            changes, the others random.
        max_evaluations: limit of evaluations of one search, without those of the starting points.
        tolerance: relative rise of the energy, in two steps, below which a search ends.
        seed: seed of the random starting points and of mode "resample".

    Raises:
        InvalidValueError: if a number is out of range.
    """

    starts: int = 8
    max_evaluations: int = 60
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.starts < 1 or self.max_evaluations < 1 or not self.tolerance >= 0:
            raise InvalidValueError(
                f"A search needs at least one start and one evaluation and a tolerance of 0 or more; "
                f"got starts={self.starts}, max_evaluations={self.max_evaluations}, tolerance={self.tolerance}."
            )


def extract_causal_bases(
    model: LanguageModel,
    text: EvaluationText,
    lens: Lens | str | Path | None = None,
    *,
    directions: int = 10,
    layers: Sequence[int] | None = None,
    mode: AblationMode = "mean",
    max_seq_len: int | None = None,
    max_tokens: int | None = DEFAULT_TOKENS,
    bos: bool = True,
    options: SearchOptions | None = None,
    folder: str | Path | None = None,
    on_direction: Callable[[CausalBasis], None] | None = None,
) -> dict[int, CausalBasis]:
    """Find the directions of each layer that the lens's prediction depends on most.

    The searches of all layers go on side by side: one pass over the unembedding serves all of them.

    Args:
        model: the model.
        text: as in `metalens.evaluate`.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None = the logit lens.
        directions: k, number of directions of each layer, 1 to D.
        layers: layer numbers, negative from the end; None = all. Layer i is the output of block i.
        mode: the kind of ablation.
        max_seq_len: tokens per sequence; None = 512, or the model's context if that is shorter.
        max_tokens: tokens to read from the start. Their hidden states [N, D] of every layer are held in memory. None = all.
        bos: begin each sequence with the tokens that the tokenizer puts before a text.
        options: how each direction is searched. None = the defaults of `SearchOptions`.
        folder: folder that gets the file of a layer after each of its directions. Directions that are there already are kept, and the
            extraction goes on after them. None = write nothing.
        on_direction: function that is called with the basis of a layer after each of its directions.

    Returns:
        {layer: basis of k directions}, in the order of `layers`.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an empty text, a lens of another model, an unknown layer, settings out of range, or a folder with bases
            of another extraction.
        OSError: if a file can't be written.
    """
    options = options or SearchOptions()
    chosen, the_lens = select_layers(layers, model.num_layers), as_lens(lens)
    check_lens(the_lens, model)
    width = model.unembed.hidden_dim
    if not 1 <= directions <= width:
        raise InvalidValueError(f"directions must be from 1 to {width}, the width of the residual stream; got {directions}.")
    sequences = sequences_of(model, text, max_seq_len=max_seq_len, max_tokens=max_tokens, bos=bos)
    rows = hidden_rows(model, sequences, chosen)
    means = {layer: np.array(h).mean(axis=0, dtype=np.float64) for layer, h in rows.items()}
    energy = LensEnergy(model.unembed, the_lens, rows, mode, means, options.seed)
    common = {"text": text_hash(sequences), "mode": mode, **vars(options)}
    common |= {} if folder is None else {"model": model.weights_hash}

    def keep(basis: CausalBasis) -> None:
        if folder is not None:
            basis.save(basis_path(folder, basis.layer))
        if on_direction is not None:
            on_direction(basis)

    searches = {}
    for layer in chosen:
        settings = common | {"lens": _lens_hash(the_lens, layer)}
        basis = None if folder is None else stored_basis(basis_path(folder, layer), settings)
        if basis is None:
            basis = _empty(layer, means[layer], mode, len(rows[layer]), settings)
        searches[layer] = _search_layer(basis, directions, np.array(energy.replacements[layer] - rows[layer]), options, keep)
    return _side_by_side(searches, energy)


def _side_by_side(searches: Mapping[int, _LayerSearch], energy: LensEnergy) -> dict[int, CausalBasis]:
    """Run the searches of several layers to their ends. Each round evaluates one point of every search that is still going."""
    results: dict[int, CausalBasis] = {}
    waiting: dict[int, np.ndarray] = {}

    def go_on(layer: int, value: Value | None) -> None:
        try:
            waiting[layer] = next(searches[layer]) if value is None else searches[layer].send(value)
        except StopIteration as end:
            results[layer] = end.value

    for layer in searches:
        go_on(layer, None)
    while waiting:
        points = dict(waiting)
        waiting.clear()
        for layer, value in energy(points).items():
            go_on(layer, value)
    return {layer: results[layer] for layer in searches}


def _search_layer(
    basis: CausalBasis, directions: int, change: np.ndarray, options: SearchOptions, keep: Callable[[CausalBasis], None]
) -> _LayerSearch:
    """Search the directions that a layer's basis still lacks.

    Args:
        basis: the directions that are there.
        directions: how many there must be.
        change: [N, D] replacement - h, what a full ablation changes.
        options: how to search.
        keep: called with the basis after each direction.
    """
    principal = np.linalg.svd(change, full_matrices=False)[2].astype(np.float64) if len(basis) < directions else np.empty((0, 0))
    while len(basis) < directions:
        # A generator of its own for each direction: an extraction that goes on finds what one without a break finds.
        rng = np.random.default_rng([options.seed, basis.layer, len(basis)])
        best, height = None, -np.inf
        starts = _starts(principal, change, basis.vectors, options.starts, rng)
        for start in starts if len(starts) > 1 else ():
            value, _ = yield start
            if value > height:
                best, height = start, value
        maximum = yield from maximize_on_sphere(
            starts[0] if best is None else best, basis.vectors, max_evaluations=options.max_evaluations, tolerance=options.tolerance
        )
        basis = _with(basis, maximum, len(starts))
        keep(basis)
    return basis.first(directions)


def _starts(principal: np.ndarray, change: np.ndarray, basis: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return unit vectors orthogonal to a basis: the principal directions along which an ablation changes most, and random ones."""
    width = change.shape[1]
    free = width - len(basis)
    wanted = min(count, free)
    parts = [without(principal[i], basis) for i in range(min(len(principal), len(basis) + wanted))]
    parts = sorted((unit(part) for part in parts if np.linalg.norm(part) > 0.1), key=lambda v: -float(np.square(change @ v).sum()))
    starts = parts[: -(-wanted // 2)]
    while len(starts) < wanted:
        starts.append(unit(without(rng.standard_normal((width,)), basis)))
    return starts


def _empty(layer: int, mean: np.ndarray, mode: AblationMode, tokens: int, settings: dict[str, Any]) -> CausalBasis:
    counts = np.zeros(0, np.int64)
    return CausalBasis(layer, np.zeros((0, len(mean))), np.zeros(0), counts, counts.astype(bool), mean, mode, tokens, settings)


def _with(basis: CausalBasis, found: Maximum, starts: int) -> CausalBasis:
    """Return a basis with one more direction."""
    evaluations = found.evaluations + (starts if starts > 1 else 0)
    return replace(
        basis,
        vectors=np.vstack([basis.vectors, found.point]),
        energies=np.append(basis.energies, found.value),
        evaluations=np.append(basis.evaluations, evaluations),
        converged=np.append(basis.converged, found.converged),
    )


def _lens_hash(lens: Lens, layer: int) -> str:
    """Return what tells the lens of one layer from others: the SHA-256 of a tuned lens's translator, else its kind."""
    return translator_hash(lens, layer) if isinstance(lens, TunedLens) else lens_kind(lens)
