"""The training loop: sequences -> hidden states -> sums over the tokens of a step -> one update per layer -> checkpoint.

A run holds the parameters and optimizer state of the layers that it trains in one pass, one gradient for each of them, and the hidden states and a
chunk of logits of one batch: no memory grows with the tokens of a step. A checkpoint has all that the next step depends on, so a run that was killed
and resumed gives the lens of one that was not, bit for bit on one backend.

`metalens.training.train` is the usual way to this loop.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.models.unembed import Unembed
from metalens.training.batching import BatchedCapture, step_groups
from metalens.training.callbacks import Callback, Progress, callbacks_of_process
from metalens.training.checkpoint import CheckpointFolder
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, Producer, Sampler, Step
from metalens.training.distributed import Group, LayerPass
from metalens.training.guard import Guard, GuardWarning, message
from metalens.training.input_scale import InputScale, measured_scales
from metalens.training.optimizer import gradient_norm
from metalens.training.resume import RunCheckpoints, RunFacts, with_older_defaults
from metalens.training.state import TrainingState, in_training_dtype
from metalens.training.step import Sums, accumulate, no_sums
from metalens.training.warm_start import regressions
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError, MetalensError
from metalens.utils.progress_bar import PhaseBar

log = logging.getLogger(__name__)

QUICK = 1.0  # seconds: a step that will be done within this time is finished when the run is asked to stop, a longer one is dropped


class TrainingInterruptedError(MetalensError):
    """The run was asked to stop, and stopped. Its newest checkpoint, if it writes any, has all its progress.

    Args:
        message: where the run stopped.
        learned: whether there is progress to go on from: a step, or the result of a warm start.

    Attributes:
        learned: as given.
    """

    def __init__(self, message: str, learned: bool = True) -> None:
        self.learned = learned
        super().__init__(message)


class _StopNow(Exception):  # noqa: N818 - no error: it leaves the sums of a step or of a warm start
    """The run was asked to stop, and the work at hand would take too long to finish."""


def train_loop(
    source: ResidualCapture,
    unembed: Unembed,
    data: mx.array | Corpus,
    config: TrainingConfig,
    *,
    callbacks: Sequence[Callback | Callable[[Progress], Any]] = (),
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    group: Group | None = None,
    stop: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> TunedLens:
    """Train a lens to predict, from the output of every block, what the model itself predicts: minimize KL(model || lens) over tokens.

    A step whose loss or gradient is not finite is skipped with a warning and counted; the lens and the optimizer stay as they were.

    Args:
        source: captures the model's hidden states.
        unembed: the model's norm and head.
        data: the training text, as a Corpus or as token ids [tokens].
        config: the settings.
        callbacks: receivers of the run's events: a Callback is called in rank 0 alone, a function of a Progress after every step in every process.
        checkpoints: folder for checkpoints, one for each run. None = write none.
        checkpoint_every: steps between checkpoints, at least 1. None = only at the end of each pass and when the run is stopped.
        resume: go on from the newest checkpoint, if there is one.
        group: the processes of the run, each of which must make the same call. None = this process alone.
        stop: function that is called after every step. True, in any process, writes a checkpoint and ends the run in all. A run of one process
            also calls it within steps and within the warm start, and drops what it has of them unless they end within a second: resuming repeats
            them.
        show_progress: show a progress bar on stderr that names the phase (warm start, training), with tokens/s and the time left.

    Returns:
        the lens. If the processes divide the layers, rank 0 has the whole lens, and others have the identity for the layers of others.

    Raises:
        NotEnoughDataError: if the text is shorter than the run and must not repeat.
        InvalidValueError: if the text is shorter than one sequence or has ids that the model does not know; if the checkpoint belongs to another run
            (names the differences); if there are checkpoints and `resume` is False; if the settings do not fit the model; or if the processes of a
            group differ in settings, model, text or versions.
        GroupLostError: if another process of the group has ended.
        TrainingInterruptedError: when `stop` returned True.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise InvalidValueError(f"checkpoint_every must be at least 1, or None, got {checkpoint_every}.")
    tokens = data.tokens if isinstance(data, Corpus) else data.size
    if tokens < config.max_seq_len:
        raise InvalidValueError(
            f"Dataset too small: {tokens} tokens, need at least {config.max_seq_len}. Provide more text data, or lower max_seq_len."
        )
    group = group or Group()
    config = with_older_defaults(config, checkpoints, group) if resume else config
    told = callbacks_of_process(callbacks, group.rank)
    corpus = data if isinstance(data, Corpus) else Corpus.from_ids(np.array(data))
    of_run = RunCheckpoints(checkpoints, group, RunFacts(config, source, unembed))
    run = _Run(source, unembed, corpus, config, group, of_run, checkpoint_every, told, stop)
    try:
        return run.train(resume, show_progress)
    finally:
        for callback in told:
            callback.on_end()


class _Run:
    """One run: passes over the text, each of which trains some layers (all, unless config.layers_at_once says otherwise) in steps."""

    def __init__(
        self,
        source: ResidualCapture,
        unembed: Unembed,
        corpus: Corpus,
        config: TrainingConfig,
        group: Group,
        checkpoints: RunCheckpoints,
        checkpoint_every: int | None,
        callbacks: Sequence[Callback],
        stop: Callable[[], bool],
    ) -> None:
        self.unembed, self.corpus, self.config, self.group = unembed, corpus, config, group
        self.checkpoints, self.checkpoint_every, self.callbacks, self.stop = checkpoints, checkpoint_every, callbacks, stop
        self.capture = BatchedCapture(source, unembed.embedding_rows)
        self.bar = PhaseBar(False)
        self.saved: tuple[int, int] | None = None  # pass and step of the newest checkpoint
        self.work: tuple[float, int, int] | None = None  # start, tokens, and tokens that are done of the step or warm start at hand
        start = self._identity()  # checks that rank and layers fit the model
        self.layers = start.layers
        self.parameters_per_layer = len(parameters_of(start.translators[self.layers[0]]))
        self.passes = group.passes(self.layers, config.layers_at_once)
        mine = group.layers_of(self.layers)
        self.guard = Guard(self._new_sampler().held_back_sequences(), config, self.capture, unembed, group)
        self.state = TrainingState({layer: in_training_dtype(parameters_of(start.translators[layer]), config) for layer in mine})

    def _identity(self) -> TunedLens:
        """Return the lens that training starts from. Its arrays take no memory before they are used."""
        config, layers = self.config, len(self.capture.source)
        return TunedLens(layers, self.unembed.hidden_dim, rank=config.rank, bias_only=config.bias_only, layers=config.layers, seed=config.seed or 0)

    def train(self, resume: bool, show_progress: bool) -> TunedLens:
        """Make all passes, from the newest checkpoint on if asked."""
        config, state = self.config, self.state
        sampler = self._start(resume)
        first = self._steps_done
        for callback in self.callbacks:
            callback.on_start(config, first)
        with PhaseBar(show_progress and self.group.writes) as self.bar:
            while state.pass_index < len(self.passes):
                self._train_pass(self.passes[state.pass_index], sampler)
                if state.pass_index < len(self.passes) - 1:
                    sampler = self._sampler()
                state.end_pass()
        return self._trained_lens()

    @property
    def _steps_done(self) -> int:
        """Return the number of steps that are done in all passes."""
        return self.state.pass_index * self.config.num_steps + self.state.step

    def _start(self, resume: bool) -> Sampler:
        """Check that the run can start. Restore the newest checkpoint if asked. Return the sampler for the rest of the pass."""
        checkpoints, facts = self.checkpoints, self.checkpoints.facts
        arguments = {"resume": resume, "checkpoint_every": self.checkpoint_every, "checkpoints": checkpoints.root is not None}
        facts.require_same_in_group(self.group, self.corpus, **arguments)
        sampler = self._sampler()
        checkpoints.require_place(resume)
        saved = checkpoints.newest() if resume else None
        if saved is not None:
            facts.require_record(saved.record)
            sampler.restore(saved.record["position"])
            self.state.restore(saved.arrays, saved.record, self.config, [each.layers for each in self.passes])
            self.saved = self.state.pass_index, self.state.step
        return sampler

    def _sampler(self) -> Sampler:
        """Return a sampler at the start of the text, which is long enough for a pass (NotEnoughDataError)."""
        config, sampler = self.config, self._new_sampler()
        if not config.repeat:
            start = sampler.state()
            if config.warm_start_tokens:
                sampler.take_step(config.warm_start_tokens)
            sampler.require(config.step_tokens, config.num_steps)
            sampler.restore(start)
        return sampler

    def _new_sampler(self) -> Sampler:
        """Return a sampler at the start of the text."""
        config = self.config
        return Sampler(self.corpus, config.max_seq_len, seed=config.seed, repeat=config.repeat, held_back=config.held_back_tokens)

    def _train_pass(self, layers: LayerPass, sampler: Sampler) -> None:
        """Make the remaining steps of a pass."""
        config, state = self.config, self.state
        if state.optimizer is None:
            self._start_pass(layers.layers, sampler)
        else:
            self._check(layers.layers, sampler.state())  # the run may have been stopped in the check after its newest step
        if config.num_steps:
            self.bar.start("training the lens", len(self.passes) * config.num_steps * config.step_tokens, self._steps_done * config.step_tokens)
        with Producer(step_groups(sampler, config, state.step, *self.group.data_rank)) as groups:
            for group in groups:
                # With more processes than layers, some have no layer and need no hidden states.
                captured = self.capture.by_step(group.steps, self._pause) if layers.layers else iter([()] * len(group.steps))
                for i, data in enumerate(group.steps):
                    self.work = time.monotonic(), data.tokens, 0
                    try:
                        hidden_states = next(captured)
                        if group.first + i < state.step:  # done before the checkpoint from which the run goes on
                            continue
                        self._step(data, hidden_states, layers)
                    except _StopNow:
                        self._stopped_within_a_step(group.position)
                    self._check(layers.layers, group.resumable(i))
                    self._save_or_stop(group.resumable(i))

    def _start_pass(self, layers: Sequence[int], sampler: Sampler) -> None:
        """Make the closed-form solution of the layers, if the settings ask for it, and the optimizer. Keep the solution in a checkpoint."""
        config, state = self.config, self.state
        start = sampler.state()
        try:
            scales = self._warm_start(layers, sampler) if config.warm_start_tokens else self._scales(layers, sampler)
        except _StopNow:
            learned = self._steps_done > 0  # the steps of the passes before, whose end has a checkpoint
            at = "the warm start" if config.warm_start_tokens else "the first step"
            raise TrainingInterruptedError(f"Stopped within {at}, which begins anew.", learned) from None
        finally:
            if not config.warm_start_tokens:
                sampler.restore(start)  # the tokens of the scales are those of the first step
        state.start_pass(config, layers, scales)
        self._check(layers, sampler.state())
        if not config.warm_start_tokens or (state.pass_index and self.group.divides_layers):
            return  # its number is that of the checkpoint before it, and another process may have that one as its newest
        self._save(sampler.state())

    def _check(self, layers: Sequence[int], position: dict[str, Any]) -> None:
        """Let the guard check the layers, if it is time. Set back those that have become worse, and after the last step all to their best state.

        If the run is to stop, it ends without the check, which a resumed run makes first. `position` is where it goes on.
        """
        state, ended = self.state, self.state.step == self.config.num_steps
        if state.checked == state.step or not self.guard.due(state.step):
            return
        self.work = time.monotonic(), self.guard.tokens, 0
        try:
            found = self.guard.kl(layers, state.parameters, self._pause, self._worked)
        except _StopNow:
            self._stopped_within_a_step(position)
        self.work, state.checked = None, state.step
        risen = state.best.worse(found, state.parameters)
        for layer in layers if ended else risen:
            state.set_back(layer)
        if risen and (self.group.writes or self.group.divides_layers):
            warnings.warn(message(risen, found, state.best.kl, state.step, ended), GuardWarning, stacklevel=2)

    def _scales(self, layers: Sequence[int], sampler: Sampler) -> dict[int, InputScale]:
        """Return the scale of the hidden states of the next step, if the optimizer needs it."""
        if self.config.step_size != "loss" or not self.config.num_steps:
            return {}
        data = sampler.take_step(self.config.step_tokens, *self.group.data_rank)
        self.work = time.monotonic(), data.tokens, 0
        hidden_states = self._counted(self.capture.hidden_states(data.sequences, self._pause)) if layers else ()
        found = measured_scales(hidden_states, layers, self.unembed.hidden_dim, self.group.sum_over_data)
        self.work = None
        return found

    def _warm_start(self, layers: Sequence[int], sampler: Sampler) -> dict[int, InputScale]:
        """Replace the parameters of layers by the closed-form solution on the next tokens. Return the scale of their hidden states."""
        config, group = self.config, self.group
        data = sampler.take_step(config.warm_start_tokens, *group.data_rank)
        self.bar.start("warm start", data.tokens)
        self.work = time.monotonic(), data.tokens, 0
        hidden_states = self._counted(self.capture.hidden_states(data.sequences, self._pause))
        found = regressions(hidden_states, layers, self.unembed.hidden_dim, group.sum_over_data)
        self.work = None
        self.bar.reach(data.tokens)
        for layer, regression in found.items():
            parameters = dict(zip(("weight", "bias"), regression.solution(config.ridge), strict=True))
            # Rank 0 sends its solution: other processes may round theirs otherwise.
            self.state.parameters[layer] = in_training_dtype(parameters if group.divides_layers else group.broadcast(parameters), config)
        self.state.tokens += data.tokens
        return {layer: regression.scale() for layer, regression in found.items()}

    def _counted(self, passes: Iterable[HiddenStates]) -> Iterator[HiddenStates]:
        """Yield forward passes, and count their tokens when they are used up."""
        for batch in passes:
            yield batch
            self._done(batch.hidden[-1].shape[0] * batch.hidden[-1].shape[1])
            self._pause()

    def _done(self, tokens: int) -> None:
        """Count tokens of the step or warm start at hand as done."""
        tokens *= self.group.data_rank[1]  # the other processes are about as far
        self._worked(tokens)
        self.bar.advance(tokens)

    def _worked(self, tokens: int) -> None:
        """Count tokens of the work at hand as done, whose time decides whether it is finished when the run is to stop."""
        if self.work is not None:
            start, total, done = self.work
            self.work = start, total, done + tokens

    def _pause(self) -> None:
        """Move the progress bar, and leave the step or warm start at hand (_StopNow) if the run is to stop and it would take long to finish.

        In a group the processes ask each other after steps only: they do not pause equally often.
        """
        self.bar.tick()
        if self.work is None or self.group.size > 1:
            return
        start, total, done = self.work
        elapsed, fraction = time.monotonic() - start, min(done / total, 1.0)
        left = elapsed * (1 - fraction) / fraction if fraction else elapsed
        if left > QUICK and self.stop():
            self.work = None
            raise _StopNow

    def _stopped_within_a_step(self, position: dict[str, Any]) -> NoReturn:
        """End the run. The sums of the step, or of a check, are dropped; `position` is where the run goes on."""
        state = self.state
        warm = bool(self.config.warm_start_tokens)
        learned = self._steps_done > 0 or warm
        if learned and self.saved != (state.pass_index, state.step):
            self._save(position)
        if state.step:
            raise TrainingInterruptedError(f"Stopped after step {state.step}.") from None
        raise TrainingInterruptedError(
            f"Stopped {'after the warm start' if warm else 'within the first step, which begins anew'}.", learned
        ) from None

    def _step(self, data: Step, hidden_states: Iterable[HiddenStates], layers: LayerPass) -> None:
        """Sum over the tokens of a step, update every layer, and tell the callbacks."""
        start, config, state = time.perf_counter(), self.config, self.state
        sums = self._sum_over_tokens(hidden_states, layers.layers)
        self.work = None
        summed, norm = self._losses_and_norm(sums, layers)
        losses = [loss / data.tokens for loss in summed]
        scale = 1 / (data.tokens * (len(self.layers) if config.reduction == "mean" else 1))
        norm *= scale
        if math.isfinite(norm) and all(map(math.isfinite, losses)):
            self._update(sums, scale, norm)
        else:
            state.skipped += 1
            warnings.warn(
                f"Step {state.step} has a loss or gradient that is not finite; it is skipped and the lens left as it was. "
                "If this happens often, lower the learning rate; if the model is float16, which may overflow, convert it to bfloat16.",
                RuntimeWarning,
                stacklevel=2,
            )
        state.tokens += data.tokens
        loss = math.fsum(losses) / max(len(losses), 1)
        number, rate, speed = self._steps_done, config.learning_rate_at(state.step), data.tokens / (time.perf_counter() - start)
        state.step += 1
        self._tell(Progress(number, loss, losses, state.tokens, layers.of_all, norm, rate, speed, state.skipped))

    def _sum_over_tokens(self, hidden_states: Iterable[HiddenStates], layers: Sequence[int]) -> Sums:
        """Return the sums over all tokens of a step, of all processes."""
        parameters = [self.state.parameters[layer] for layer in layers]
        sums = no_sums(layers)
        for batch in hidden_states:
            accumulate(sums, parameters, batch, self.unembed, self._piece_done)
        if not sums.gradients:  # a small step has no sequence for some processes
            sums.gradients = [{name: mx.zeros(p.shape) for name, p in of_layer.items()} for of_layer in parameters]
        sums.losses = self.group.sum_step(sums.losses, sums.gradients)
        return sums

    def _piece_done(self, tokens: int) -> None:
        """Count tokens whose gradient is known, and pause."""
        self._done(tokens)
        self._pause()

    def _losses_and_norm(self, sums: Sums, layers: LayerPass) -> tuple[list[float], float]:
        """Return the summed loss of every layer, and the norm of the summed gradient, over the layers of all processes."""
        losses = to_list(sums.losses)
        if not self.group.divides_layers:
            return losses, gradient_norm(sums.gradients)
        return self.group.gather_layers(layers.layers, layers.of_all, losses, sums.gradients, self.parameters_per_layer)

    def _update(self, sums: Sums, scale: float, norm: float) -> None:
        """Update every layer of this process. The norm decides about the clip."""
        state = self.state
        assert state.optimizer is not None
        clipped = scale * state.optimizer.clip(norm)
        for layer, gradient, loss in zip(sums.layers, sums.gradients, to_list(sums.losses), strict=True):
            state.parameters[layer] = state.optimizer.update(layer, state.parameters[layer], gradient, state.step, clipped, loss)

    def _tell(self, progress: Progress) -> None:
        """Tell the progress bar, the log and the callbacks about a step."""
        total = len(self.passes) * self.config.num_steps
        self.bar.reach(self._steps_done * self.config.step_tokens, step=f"{progress.step + 1}/{total}", KL=f"{progress.loss:.3f}")
        log.debug("step %d loss %.4f gradient norm %.4f", progress.step, progress.loss, progress.gradient_norm)
        for callback in self.callbacks:
            callback.on_step(progress)

    def _save_or_stop(self, position: dict[str, Any]) -> None:
        """Write a checkpoint if one is due, and end the run if a process was asked to stop. After the last step it is too late for that."""
        state, every = self.state, self.checkpoint_every
        ended = state.step == self.config.num_steps
        stopping = self.group.any(self.stop()) and not (ended and state.pass_index == len(self.passes) - 1)
        if ended or stopping or (every is not None and state.step % every == 0):
            self._save(position)
        if stopping:
            raise TrainingInterruptedError(f"Stopped after step {state.step}.")

    def _save(self, position: dict[str, Any]) -> None:
        """Write a checkpoint, from which a run goes on at a position in the text."""
        saved = self.checkpoints.save(self.state, position)
        self.saved = self.state.pass_index, self.state.step
        if saved is not None:
            for callback in self.callbacks:
                callback.on_checkpoint(*saved)

    def _trained_lens(self) -> TunedLens:
        """Return the lens in float32. Divided layers are gathered in rank 0, one at a time; other processes keep their own."""
        lens, group = self._identity(), self.group
        for i, layer in enumerate(self.layers):
            parameters = self.state.parameters.get(layer, {})
            if group.divides_layers:
                everywhere = group.broadcast(parameters, root=i % group.size)
                parameters = everywhere if group.writes else parameters
            for name, value in parameters.items():
                setattr(lens.translators[layer], name, value.astype(mx.float32))
            mx.eval(parameters_of(lens.translators[layer]) if parameters else [])
        return lens
