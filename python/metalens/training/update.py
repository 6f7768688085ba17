"""One update of every layer: the sums over the tokens of a step, of all processes, and what the optimizer makes of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from metalens.models.capture import HiddenStates
from metalens.models.layers import Layer
from metalens.ops import Head
from metalens.training.distributed import LayerPass
from metalens.training.objective import Objective
from metalens.training.optimizer import gradient_norm
from metalens.training.run_context import RunContext
from metalens.training.state import TrainingState
from metalens.training.step import Sums, accumulate, no_sums, piece_tokens
from metalens.utils.arrays import to_float, to_list


@dataclass(frozen=True)
class Update:
    """The figures of a step.

    Attributes:
        losses: loss of each layer of the pass before the update, nats per token.
        norm: norm of the gradient over all layers of the pass.
    """

    losses: list[float]
    norm: float


def sums_over_tokens(run: RunContext, state: TrainingState, hidden_states: Iterable[HiddenStates], layers: Sequence[Layer]) -> Sums:
    """Return the sums over all tokens of a step, of all processes.

    Raises:
        StopNow: if the run is to stop and the step would take long to finish.
    """
    parameters = [state.parameters[layer] for layer in layers]
    sums, objective = no_sums(layers), Objective.of(run.config)

    def heads(n_model: mx.array, before: int) -> Iterable[Head]:
        assert run.vocabulary is not None
        return run.vocabulary.heads(n_model, state.step, before, piece_tokens(1, run.unembed.head), run.clock.pause)

    for batch in hidden_states:
        if not layers:  # the pass was for the other processes of a divided model
            continue
        accumulate(sums, parameters, batch, run.unembed, run.clock.done, heads if run.vocabulary else None, objective)
    if not sums.gradients:  # a small step has no sequence for some processes
        sums.gradients = [{name: mx.zeros(p.shape) for name, p in of_layer.items()} for of_layer in parameters]
    totals = run.group.sum_step(mx.concatenate([sums.losses, mx.array([float(sums.tokens)])]), sums.gradients)
    sums.losses, sums.tokens = totals[:-1], round(to_float(totals[-1]))
    return sums


def update_layers(run: RunContext, state: TrainingState, sums: Sums, tokens: int, layers: LayerPass) -> Update:
    """Update every layer of this process.

    A step whose loss or gradient is not finite is skipped with a warning and counted.

    Args:
        run: the run.
        state: its state; `step` is the number of this step.
        sums: sums over the tokens of the step.
        tokens: number of these tokens, of all processes. With a token_shift, the ends of sequences have nothing to be compared with.
        layers: layers of the pass.
    """
    summed, norm, counted = _losses_and_norm(run, sums, layers)
    if run.config.shift and counted:
        tokens = counted
    losses = [loss / tokens for loss in summed]
    scale = 1 / (tokens * (len(run.layers) if run.config.reduction == "mean" else 1))
    norm *= scale
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        _apply(state, sums, scale, norm)
    else:
        state.skipped += 1
        warnings.warn(
            f"Step {state.step} has a loss or gradient that is not finite; it is skipped and the lens left as it was. "
            "If this happens often, lower the learning rate; if the model is float16, which may overflow, convert it to bfloat16.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Update(losses, norm)


def _losses_and_norm(run: RunContext, sums: Sums, layers: LayerPass) -> tuple[list[float], float, int]:
    """Return the summed loss of every layer, the norm of the summed gradient, and the tokens that were counted, over the layers of all processes."""
    losses = to_list(sums.losses)
    if not run.group.divides_layers:
        return losses, gradient_norm(sums.gradients), sums.tokens
    return run.group.gather_layers(layers.layers, layers.of_all, losses, sums.gradients, run.parameters_per_layer, sums.tokens)


def _apply(state: TrainingState, sums: Sums, scale: float, norm: float) -> None:
    """Let the optimizer change the parameters. The norm decides about the clip."""
    assert state.optimizer is not None
    clipped = scale * state.optimizer.clip(norm)
    for layer, gradient, loss in zip(sums.layers, sums.gradients, to_list(sums.losses), strict=True):
        state.parameters[layer] = state.optimizer.update(layer, state.parameters[layer], gradient, state.step, clipped, loss)
