"""Change the running model, and measure what that does to its predictions: ablated directions, and blocks deleted, moved or replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx
import numpy as np

from metalens.analysis.ablation import ablate_block
from metalens.analysis.resampling import Interval, bootstrap_mean
from metalens.models.capture import BlockEdit, Edit, HiddenStates, ResidualCapture
from metalens.models.language_model import LanguageModel
from metalens.models.rewiring import reordered_blocks
from metalens.ops import lens_stats
from metalens.readings.rows import require_finite
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar

ROWS_AT_ONCE = 16  # changed models whose last rows go through the head together

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Intervention:
    """A change of the running model.

    Attributes:
        edits: {block: edit of its output}, as in `ResidualCapture.capture`.
        order: for each place the block that computes there, as in `reordered_blocks`. None = as it is.
    """

    edits: Mapping[int, Edit | BlockEdit] = field(default_factory=dict)
    order: Sequence[int] | None = None

    def capture(self, source: ResidualCapture, ids: mx.array) -> HiddenStates:
        """Run the changed model on ids [B, T]."""
        with contextlib.nullcontext() if self.order is None else reordered_blocks(source.layers, self.order):
            return source.capture(ids, self.edits)


def delete_blocks(blocks: Iterable[int]) -> Intervention:
    """Return the intervention that lets blocks add nothing to the residual stream."""
    return Intervention({block: ablate_block("zero") for block in blocks})


def swap_blocks(a: int, b: int, num_layers: int) -> Intervention:
    """Return the intervention that lets two of L blocks change places (InvalidValueError if there are no such blocks)."""
    _require_blocks((a, b), num_layers)
    order = list(range(num_layers))
    order[a], order[b] = b, a
    return Intervention(order=order)


def permute_blocks(order: Sequence[int]) -> Intervention:
    """Return the intervention in which block order[i] computes at place i."""
    return Intervention(order=list(order))


def replace_block(block: int, by: int, num_layers: int) -> Intervention:
    """Return the intervention that lets another of L blocks compute in the place of one (InvalidValueError if there are no such blocks)."""
    _require_blocks((block, by), num_layers)
    return Intervention(order=[by if place == block else place for place in range(num_layers)])


def _require_blocks(blocks: Iterable[int], num_layers: int) -> None:
    unknown = [block for block in blocks if not 0 <= block < num_layers]
    if unknown:
        raise InvalidValueError(f"The model has blocks 0 to {num_layers - 1}; there is no block {', '.join(map(str, unknown))}.")


@dataclass(frozen=True)
class Effect:
    """What an intervention does to the model's predictions, with bootstrap intervals over sequences.

    Attributes:
        kl: KL(intact model || changed model), nats per token, mean over all positions.
        ce: rise of the cross-entropy of the next token, nats per token, mean over the positions that have one.
    """

    kl: Interval
    ce: Interval


def measure_effects(
    model: LanguageModel,
    sequences: Sequence[mx.array],
    interventions: Mapping[K, Intervention],
    *,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[K, Effect]:
    """Run the model with each of several changes, and compare its predictions with those of the intact model.

    Cost: 1 + len(interventions) forward passes of the text.

    Args:
        model: the model.
        sequences: ids [T] of each sequence, as `metalens.analysis.sequences_of` returns them.
        interventions: the changes, by name.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
        show_progress: show a progress bar on stderr.

    Returns:
        the effect of each change, by name.

    Raises:
        InvalidValueError: if no sequence has two tokens, there is no such block, or logits are NaN.
    """
    labeled = [ids for ids in sequences if ids.size > 1]
    if not labeled:
        raise InvalidValueError("Every sequence has a single token only. The effect of a change on the next token needs two.")
    names = list(interventions)
    kl, ce = np.zeros((2, len(names), len(labeled)))
    with token_bar(len(names) * sum(ids.size for ids in labeled), "intervening", show_progress) as bar:
        for column, ids in enumerate(labeled):
            own = _last_rows(model, model.source.capture(ids[None]))
            labels = mx.concatenate([ids[1:], ids[:1]])  # the last label is a placeholder
            intact = np.array(lens_stats(own[None], model.unembed.head, 1, own, labels).nll)[0, :-1].astype(np.float64)
            for start in range(0, len(names), ROWS_AT_ONCE):
                chosen = names[start : start + ROWS_AT_ONCE]
                rows = []
                for name in chosen:
                    rows.append(_last_rows(model, interventions[name].capture(model.source, ids[None])))
                    bar.update(ids.size)
                stats = lens_stats(mx.stack(rows), model.unembed.head, 1, own, labels)
                require_finite(stats)
                kl[start : start + len(chosen), column] = np.array(stats.kl).mean(axis=1, dtype=np.float64)
                ce[start : start + len(chosen), column] = (np.array(stats.nll)[:, :-1].astype(np.float64) - intact).mean(axis=1)
    sizes = np.array([ids.size for ids in labeled])

    def mean(values: np.ndarray, weights: np.ndarray) -> Interval:
        return bootstrap_mean(values, weights, resamples=resamples, seed=seed)

    return {name: Effect(mean(kl[i], sizes), mean(ce[i], sizes - 1)) for i, name in enumerate(names)}


def _last_rows(model: LanguageModel, states: HiddenStates) -> mx.array:
    """Return the rows [T, D] that the head reads of one sequence, evaluated: only one forward pass is in memory at a time."""
    rows = model.unembed.norm(states.hidden[-1][0]).astype(mx.float32)
    mx.eval(rows)
    return rows
