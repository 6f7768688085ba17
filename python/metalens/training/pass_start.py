"""The start of a pass: the closed-form solution of its layers, and the scale of their hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from metalens.models.layers import Layer
from metalens.training.data import Sampler
from metalens.training.input_scale import InputScale, measured_scales
from metalens.training.run_context import RunContext
from metalens.training.state import TrainingState, in_training_dtype
from metalens.training.warm_start import regressions


def started(run: RunContext, state: TrainingState, layers: Sequence[Layer], sampler: Sampler) -> dict[Layer, InputScale]:
    """Make the closed-form solution of layers, if the settings ask for it. Return the scale of their hidden states, {} if none is needed.

    The sampler is then at the first step.

    Raises:
        StopNow: if the run is to stop. The state is as it was.
    """
    if run.config.warm_start_tokens:
        return _solved(run, state, layers, sampler)
    start = sampler.state()
    try:
        return _scales(run, layers, sampler)
    finally:
        sampler.restore(start)  # the tokens of the scales are those of the first step


def _scales(run: RunContext, layers: Sequence[Layer], sampler: Sampler) -> dict[Layer, InputScale]:
    """Return the scale of the hidden states of the next step, if the optimizer needs it."""
    config, clock = run.config, run.clock
    if config.step_size != "loss" or not config.num_steps:
        return {}
    data = sampler.take_step(config.step_tokens, *run.group.data_rank)
    with clock.work(data.tokens):
        hidden_states = clock.counted(run.capture.hidden_states(data, clock.pause)) if run.capture.runs_for(layers) else ()
        return measured_scales(hidden_states, layers, run.unembed.hidden_dim, run.group.sum_over_data)


def _solved(run: RunContext, state: TrainingState, layers: Sequence[Layer], sampler: Sampler) -> dict[Layer, InputScale]:
    """Replace the parameters of layers by the closed-form solution on the next tokens. Return the scale of their hidden states."""
    config, group, clock = run.config, run.group, run.clock
    data = sampler.take_step(config.warm_start_tokens, *group.data_rank)
    clock.bar.start("warm start", data.tokens)
    with clock.work(data.tokens):
        hidden_states = clock.counted(run.capture.hidden_states(data, clock.pause))
        found = regressions(hidden_states, layers, run.unembed.hidden_dim, group.sum_over_data)
    clock.bar.reach(data.tokens)
    for layer, regression in found.items():
        parameters = dict(zip(("weight", "bias"), regression.solution(config.ridge), strict=True))
        # Rank 0 sends its solution: other processes may round theirs otherwise.
        state.parameters[layer] = in_training_dtype(parameters if group.divides_layers else group.broadcast(parameters), config)
    state.tokens += data.tokens
    return {layer: regression.scale() for layer, regression in found.items()}
