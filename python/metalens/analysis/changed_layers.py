"""How much the model's predictions depend on each block, and on the order of the blocks (Belrose et al. 2023, appendix on iterative inference)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from metalens.analysis.ablation import ablate_block
from metalens.analysis.interventions import Effect, Intervention, delete_blocks, measure_effects, replace_block, swap_blocks
from metalens.analysis.sequences import sequences_of
from metalens.evaluation.text import EvaluationText
from metalens.models.language_model import LanguageModel
from metalens.readings.rows import select_layers
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class LayerEffects:
    """What changes of one block do to the model's predictions.

    Attributes:
        layer: the block.
        effects: {name of the change in CHANGES: its effect}. A change that the block does not have is left out: the last block is not
            swapped, nor is one of a single block replaced.
    """

    layer: int
    effects: dict[str, Effect]


def _deleted(layer: int, num_layers: int, seed: int) -> Intervention:
    return delete_blocks([layer])


def _averaged(layer: int, num_layers: int, seed: int) -> Intervention:
    return Intervention({layer: ablate_block("mean")})


def _resampled(layer: int, num_layers: int, seed: int) -> Intervention:
    return Intervention({layer: ablate_block("resample", seed=seed)})


def _swapped(layer: int, num_layers: int, seed: int) -> Intervention | None:
    return swap_blocks(layer, layer + 1, num_layers) if layer + 1 < num_layers else None


def _replaced(layer: int, num_layers: int, seed: int) -> Intervention | None:
    return replace_block(layer, layer - 1 if layer else 1, num_layers) if num_layers > 1 else None


# {name: function of (block, number of blocks, seed) that returns the intervention, None if the block has none}
CHANGES: Final[dict[str, Callable[[int, int, int], Intervention | None]]] = {
    "delete": _deleted,
    "mean": _averaged,
    "resample": _resampled,
    "swap": _swapped,
    "replace": _replaced,
}


def layer_effects(
    model: LanguageModel,
    text: EvaluationText,
    changes: Sequence[str] = ("delete", "swap", "replace"),
    *,
    layers: Sequence[int] | None = None,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> list[LayerEffects]:
    """Change one block at a time, and compare the model's predictions with those of the intact model.

    The changes: "delete": the block adds nothing. "mean", "resample": it adds the mean of what it adds over the sequence, or what it adds
    at another position. "swap": it changes places with the next block. "replace": the block before it computes in its place (block 1 in
    that of block 0).

    Cost: one forward pass of the text for each change of each layer.

    Args:
        model: the model.
        text: as in `metalens.evaluate`.
        changes: names of changes.
        layers: layer numbers, negative from the end; None = all.
        max_seq_len, max_tokens, bos: as in `metalens.analysis.sequences_of`.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap and of "resample".
        show_progress: show a progress bar on stderr.

    Returns:
        one entry for each layer.

    Raises:
        InvalidValueError: for an empty text, an unknown layer, or an unknown change.
    """
    unknown = [name for name in changes if name not in CHANGES]
    if unknown or not changes:
        raise InvalidValueError(f"There is no change {unknown}; there are {', '.join(CHANGES)}. Give at least one of them.")
    chosen = select_layers(layers, model.num_layers)
    sequences = sequences_of(model, text, max_seq_len=max_seq_len, max_tokens=max_tokens, bos=bos)
    wanted = {(layer, name): CHANGES[name](layer, model.num_layers, seed) for layer in chosen for name in changes}
    interventions = {key: found for key, found in wanted.items() if found is not None}
    effects = measure_effects(model, sequences, interventions, resamples=resamples, seed=seed, show_progress=show_progress)
    return [LayerEffects(layer, {name: effects[layer, name] for name in changes if (layer, name) in effects}) for layer in chosen]
