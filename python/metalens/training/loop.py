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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.models.layers import Layer
from metalens.models.unembed import Unembed
from metalens.training.batching import BatchedCapture, step_groups
from metalens.training.callbacks import Callback, Progress, callbacks_of_process
from metalens.training.checkpoint import CheckpointFolder
from metalens.training.clock import Clock, StopNow
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, Producer, Sampler
from metalens.training.distributed import Group, LayerPass, group_of
from metalens.training.guard import Guard, GuardWarning, message
from metalens.training.pass_start import started
from metalens.training.resume import RunCheckpoints, RunFacts, with_older_defaults
from metalens.training.run_context import RunContext
from metalens.training.start import StartLens, hash_of_start, kept_layers, require_start, start_parameters
from metalens.training.state import TrainingState, in_training_dtype
from metalens.training.step import step_operands
from metalens.training.update import Update, sums_over_tokens, update_layers
from metalens.training.vocabulary import sampler_of
from metalens.utils.errors import InvalidValueError, MetalensError
from metalens.utils.progress_bar import PhaseBar

log = logging.getLogger(__name__)


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
    start: TunedLens | StartLens | None = None,
    stop: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> TunedLens:
    """Train a lens to predict, from the output of every block, what the model itself predicts: minimize KL(model || lens) over tokens.

    A step whose loss or gradient is not finite is skipped with a warning and counted; the lens and the optimizer stay as they were.

    Args:
        source: captures the model's hidden states.
        unembed: the model's norm and head.
        data: the training text, as a Corpus or as token ids [tokens]. The mask of a Corpus decides which tokens count in the loss.
        config: the settings.
        callbacks: receivers of the run's events: a Callback is called in rank 0 alone, a function of a Progress after every step in every process.
        checkpoints: folder for checkpoints, one for each run. None = write none.
        checkpoint_every: steps between checkpoints, at least 1. None = only at the end of each pass and when the run is stopped.
        resume: go on from the newest checkpoint, if there is one.
        group: the processes of the run, each of which must make the same call. None = those that hold the model, or this process alone.
        start: the lens that the run starts from. None = the identity. Layers that the run does not train keep its translators. A StartLens is
            held no longer than the run needs it.
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
    group = group_of(source, group)
    config = with_older_defaults(config, None if checkpoints is None else checkpoints.path, group) if resume else config
    told = callbacks_of_process(callbacks, group.rank)
    corpus = data if isinstance(data, Corpus) else Corpus.from_ids(np.array(data))
    start = StartLens.of(start)
    of_run = RunCheckpoints(checkpoints, group, RunFacts(config, source, unembed, hash_of_start(start, group)))
    vocabulary = sampler_of(config, unembed.head, corpus.ids, group.data_rank[0])
    capture = BatchedCapture(source, unembed.embedding_rows, with_embedding=config.embedding, shuffled=config.shuffle_tokens > 0, seed=config.seed)
    context = RunContext(config, capture, unembed, group, Clock(stop, group), vocabulary)
    run = _Run(context, corpus, of_run, checkpoint_every, told, stop, None if start is None else start.take())
    try:
        return run.train(resume, show_progress)
    finally:
        for callback in told:
            callback.on_end()


class _Run:
    """One run: passes over the text, each of which trains some layers (all, unless config.layers_at_once says otherwise) in steps."""

    def __init__(
        self,
        context: RunContext,
        corpus: Corpus,
        checkpoints: RunCheckpoints,
        checkpoint_every: int | None,
        callbacks: Sequence[Callback],
        stop: Callable[[], bool],
        start: TunedLens | None = None,
    ) -> None:
        self.context, self.corpus, self.config, self.group, self.clock = context, corpus, context.config, context.group, context.clock
        self.checkpoints, self.checkpoint_every, self.callbacks, self.stop = checkpoints, checkpoint_every, callbacks, stop
        self.saved: tuple[int, int] | None = None  # pass and step of the newest checkpoint
        fresh = context.identity()  # checks that rank and layers fit the model
        if start is not None:
            require_start(start, fresh)
        self.kept = {layer: start_parameters(start, fresh, layer) for layer in kept_layers(start, context.layers)}
        self.passes = self.group.passes(context.layers, self.config.layers_at_once)
        mine = self.group.layers_of(context.layers)
        self.guard = Guard(self._new_sampler().held_back_step(), self.config, context.capture, context.unembed, self.group)
        self.state = TrainingState({layer: in_training_dtype(start_parameters(start, fresh, layer), self.config) for layer in mine})
        if start is not None:  # what is computed from the lens's arrays would keep them until it is
            mx.eval(self.kept, self.state.parameters)

    def train(self, resume: bool, show_progress: bool) -> TunedLens:
        """Make all passes, from the newest checkpoint on if asked."""
        config, state = self.config, self.state
        sampler = self._start(resume)
        first = self._steps_done
        for callback in self.callbacks:
            callback.on_start(config, first)
        with PhaseBar(show_progress and self.group.writes) as self.clock.bar:
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
            try:
                facts.require_record(saved.record)
                sampler.restore(saved.record["position"])
                self.state.restore(saved.arrays, saved.record, self.config, [each.layers for each in self.passes])
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise InvalidValueError(
                    f"The checkpoint of step {saved.record['step']} is whole, and lacks what a run goes on from ({error!r}): metalens did not write "
                    "it. Start anew in another folder."
                ) from error
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
        held_back, shift = config.held_back_tokens, config.shift
        return Sampler(self.corpus, config.max_seq_len, seed=config.seed, repeat=config.repeat, held_back=held_back, shift=shift)

    def _train_pass(self, layers: LayerPass, sampler: Sampler) -> None:
        """Make the remaining steps of a pass."""
        config, state, clock = self.config, self.state, self.clock
        if state.optimizer is None:
            self._start_pass(layers.layers, sampler)
        else:
            self._check(layers.layers, sampler.state())  # the run may have been stopped in the check after its newest step
        if config.num_steps:
            clock.bar.start("training the lens", len(self.passes) * config.num_steps * config.step_tokens, self._steps_done * config.step_tokens)
        with Producer(step_groups(sampler, config, state.step, *self.group.data_rank)) as groups:
            for group in groups:
                # With more processes than layers, some have no layer.
                runs = self.context.capture.runs_for(layers.layers)
                operands = step_operands(self.context.vocabulary is not None)
                captured = self.context.capture.by_step(group.steps, clock.pause, operands) if runs else iter([()] * len(group.steps))
                for i, data in enumerate(group.steps):
                    try:
                        with clock.work(data.tokens):
                            hidden_states = next(captured)
                            if group.first + i < state.step:  # done before the checkpoint from which the run goes on
                                continue
                            self._step(data.tokens, hidden_states, layers)
                    except StopNow:
                        self._stopped_within_a_step(group.position)
                    self._check(layers.layers, group.resumable(i))
                    self._save_or_stop(group.resumable(i))

    def _start_pass(self, layers: Sequence[Layer], sampler: Sampler) -> None:
        """Make the closed-form solution of the layers, if the settings ask for it, and the optimizer. Keep the solution in a checkpoint."""
        config, state = self.config, self.state
        try:
            scales = started(self.context, state, layers, sampler)
        except StopNow:
            learned = self._steps_done > 0  # the steps of the passes before, whose end has a checkpoint
            at = "the warm start" if config.warm_start_tokens else "the first step"
            raise TrainingInterruptedError(f"Stopped within {at}, which begins anew.", learned) from None
        state.start_pass(config, layers, scales)
        self._check(layers, sampler.state())
        if not config.warm_start_tokens or (state.pass_index and self.group.divides_layers):
            return  # its number is that of the checkpoint before it, and another process may have that one as its newest
        self._save(sampler.state())

    def _check(self, layers: Sequence[Layer], position: dict[str, Any]) -> None:
        """Let the guard check the layers, if it is time. Set back those that have become worse, and after the last step all to their best state.

        If the run is to stop, it ends without the check, which a resumed run makes first. `position` is where it goes on.
        """
        state, ended = self.state, self.state.step == self.config.num_steps
        if state.checked == state.step or not self.guard.due(state.step):
            return
        try:
            with self.clock.work(self.guard.tokens):
                found = self.guard.kl(layers, state.parameters, self.clock.pause, self.clock.count)
        except StopNow:
            self._stopped_within_a_step(position)
        state.checked = state.step
        risen = state.best.worse(found, state.parameters)
        for layer in layers if ended else risen:
            state.set_back(layer)
        if risen and (self.group.writes or self.group.divides_layers):
            warnings.warn(message(risen, found, state.best.kl, state.step, ended, self.config.loss.upper()), GuardWarning, stacklevel=2)

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

    def _step(self, tokens: int, hidden_states: Iterable[HiddenStates], layers: LayerPass) -> None:
        """Update every layer on the tokens of a step, count it, and tell the progress bar, the log and the callbacks about it."""
        start = time.perf_counter()
        sums = sums_over_tokens(self.context, self.state, hidden_states, layers.layers)
        self._count(update_layers(self.context, self.state, sums, tokens, layers), tokens, layers, start)

    def _count(self, found: Update, tokens: int, layers: LayerPass, start: float) -> None:
        """Count a step that began at a time of `time.perf_counter`."""
        config, state = self.config, self.state
        state.tokens += tokens
        loss = math.fsum(found.losses) / max(len(found.losses), 1)
        number, rate, speed = self._steps_done, config.learning_rate_at(state.step), tokens / (time.perf_counter() - start)
        state.step += 1
        progress = Progress(number, loss, found.losses, state.tokens, layers.of_all, found.norm, rate, speed, state.skipped)
        total = len(self.passes) * config.num_steps
        self.clock.bar.reach(self._steps_done * config.step_tokens, step=f"{number + 1}/{total}", **{config.loss.upper(): f"{loss:.3f}"})
        log.debug("step %d loss %.4f gradient norm %.4f", number, loss, found.norm)
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
        lens, group = self.context.identity(self.kept), self.group
        for i, layer in enumerate(self.context.layers):
            parameters = self.state.parameters.get(layer, {})
            if group.divides_layers:
                everywhere = group.broadcast(parameters, root=i % group.size)
                parameters = everywhere if group.writes else parameters
            for name, value in parameters.items():
                setattr(lens.translator_of(layer), name, value.astype(mx.float32))
            mx.eval(parameters_of(lens.translator_of(layer)) if parameters else [])
        for layer, parameters in self.kept.items():
            for name, value in parameters.items():
                setattr(lens.translator_of(layer), name, value.astype(mx.float32))
            mx.eval(parameters_of(lens.translator_of(layer)))
        return lens
