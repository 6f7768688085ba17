"""The training loop: sequences -> streams -> sums over the step's tokens -> one update per layer -> checkpoint.

A run holds the parameters and optimizer state of the layers that it trains at a time, one gradient for each, and one batch's streams and chunk of
logits: nothing grows with the tokens of a step. All that the next step depends on is in a checkpoint, so a run that was killed and resumed gives the
lens of one that was not, bit for bit on one backend.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import TunedLens
from metalens.lenses.provenance import provenance_of
from metalens.lenses.translators import parameters_of
from metalens.models.capture import HiddenStates, ResidualCapture
from metalens.models.unembed import Unembed
from metalens.training.batching import Capture, step_groups, steps_together
from metalens.training.callbacks import Callback, OnStep, Progress
from metalens.training.checkpoint import Checkpoint, CheckpointFolder
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, Producer, Sampler, Step
from metalens.training.distributed import Group
from metalens.training.optimizer import LensOptimizer, Parameters, gradient_norm
from metalens.training.step import Sums, accumulate, no_sums
from metalens.training.warm_start import warm_start
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError, MetalensError
from metalens.utils.progress_bar import token_bar

log = logging.getLogger(__name__)


class TrainingInterruptedError(MetalensError):
    """The run was asked to stop, and did after a step; what it had done is in its newest checkpoint, if it has a folder for them."""


def train(
    source: ResidualCapture,
    unembed: Unembed,
    data: mx.array | Corpus,
    config: TrainingConfig,
    *,
    callback: Callable[[Progress], None] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    group: Group | None = None,
    stop: Callable[[], bool] = lambda: False,
    show_progress: bool = False,
) -> TunedLens:
    """Train a lens to predict, from every block's output, what the model itself will predict: KL(model || lens) over tokens.

    A step whose loss or gradient is not finite is skipped with a warning and counted; the lens and the optimizer stay as they were.

    Args:
        source: the model's residual streams.
        unembed: its norm and head.
        data: the training text, as a Corpus or as ids [tokens].
        config: the settings.
        callback: called with a Progress after every step, in every process of a group.
        callbacks: who else is told, in rank 0 alone.
        checkpoints: where checkpoints go; one folder for each run.
        checkpoint_every: steps between them, at least 1; None = only at the end and when the run is stopped.
        resume: go on from the newest checkpoint, if there is one.
        group: the processes that share the run; every one must make the same call.
        stop: asked after every step; True, in any process, writes a checkpoint and ends the run in all.
        show_progress: a progress bar on stderr with tokens/s and the time left.

    Returns:
        the lens; with layers divided among processes, the whole one in rank 0, and elsewhere the identity for others' layers.

    Raises:
        NotEnoughDataError: if the text is shorter than one sequence, or than the run and must not repeat.
        ValueError: if the text has ids that the model does not know, if the checkpoint is of another run (says what differs), if there are
            checkpoints and no resume, if the settings do not fit the model, or if the processes of a group differ in settings, model, text or
            versions.
        GroupLostError: if another process of the group has ended.
        TrainingInterruptedError: when `stop` said so.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise InvalidValueError(f"checkpoint_every must be at least 1, or None, got {checkpoint_every}.")
    tokens = data.tokens if isinstance(data, Corpus) else data.size
    if tokens < config.max_seq_len:
        raise InvalidValueError(
            f"Dataset too small: {tokens} tokens, need at least {config.max_seq_len}. Provide more text data, or lower max_seq_len."
        )
    corpus = data if isinstance(data, Corpus) else Corpus.from_ids(np.array(data))
    group = group or Group()
    listeners = [*(callbacks if group.writes else ()), *([OnStep(callback)] if callback is not None else [])]
    run = _Run(source, unembed, corpus, config, listeners, checkpoints, checkpoint_every, group, stop)
    try:
        return run.go(resume, show_progress)
    finally:
        for listener in listeners:
            listener.on_end()


class _Run:
    """One run. Its layers are trained in passes over the data, all in one unless config.layers_at_once says otherwise."""

    def __init__(
        self,
        source: ResidualCapture,
        unembed: Unembed,
        corpus: Corpus,
        config: TrainingConfig,
        callbacks: Sequence[Callback],
        checkpoints: CheckpointFolder | None,
        checkpoint_every: int | None,
        group: Group,
        stop: Callable[[], bool],
    ) -> None:
        self.source, self.unembed, self.corpus, self.config = source, unembed, corpus, config
        self.callbacks, self.checkpoints, self.checkpoint_every, self.stop = callbacks, checkpoints, checkpoint_every, stop
        self.group = group
        self.capture = Capture(source, unembed.embedding_rows)
        # A lens knows what the settings mean for a translator, and checks the layers. That of the end is not computed before, and takes no memory.
        start, self.lens = (
            TunedLens(len(source), unembed.hidden_dim, rank=config.rank, bias_only=config.bias_only, layers=config.layers, seed=config.seed or 0)
            for _ in range(2)
        )
        self.layers = self.lens.layers
        self.mine = group.layers_of(self.layers)
        passes = group.passes(self.layers, config.layers_at_once)
        self.passes = [mine for mine, _ in passes]
        self.passes_of_all = [of_all for _, of_all in passes]
        self.parameters = {layer: self._stored(parameters_of(start.translators[layer])) for layer in self.mine}
        self.pass_index = 0
        self.step = 0
        self.tokens = 0
        self.skipped = 0
        self.optimizer: LensOptimizer | None = None

    def _stored(self, parameters: Parameters) -> Parameters:
        dtype = mx.bfloat16 if self.config.dtype == "bfloat16" else mx.float32
        return {name: p.astype(dtype) for name, p in parameters.items()}

    def go(self, resume: bool, show_progress: bool) -> TunedLens:
        """All passes, from the newest checkpoint on if asked."""
        if self.group.size > 1:
            self.group.require_same(self._facts(resume))
        sampler = self._sampler()
        with self.group.together():
            self._require_no_checkpoints_of_others()
            if not resume:
                self._require_no_checkpoints()
        saved = self._newest() if resume and self.checkpoints is not None else None
        if saved is not None:
            self._restore(saved, sampler)
        first = self.pass_index * self.config.num_steps + self.step
        for listener in self.callbacks:
            listener.on_start(self.config, first)
        total = len(self.passes) * self.config.num_steps * self.config.step_tokens
        with token_bar(total, "training the lens", show_progress and self.group.writes) as bar:
            bar.update(first * self.config.step_tokens)
            while self.pass_index < len(self.passes):
                self._pass(sampler, bar)
                if self.pass_index < len(self.passes) - 1:
                    sampler = self._sampler()
                self.pass_index += 1
                self.step = 0
                self.optimizer = None
        return self._whole_lens()

    def _sampler(self) -> Sampler:
        """At the beginning of the text, which has been found to be enough for a pass."""
        config = self.config
        sampler = Sampler(self.corpus, config.max_seq_len, seed=config.seed, repeat=config.repeat)
        if not config.repeat:
            start = sampler.state()
            if config.warm_start_tokens:
                sampler.take_step(config.warm_start_tokens)
            sampler.require(config.step_tokens, config.num_steps)
            sampler.restore(start)
        return sampler

    def _pass(self, sampler: Sampler, bar: Any) -> None:
        """The steps of one group of layers that are left."""
        config, layers = self.config, self.passes[self.pass_index]
        if self.step == 0 and self.optimizer is None:
            if config.warm_start_tokens:
                self._warm_start(sampler, layers)
            self.optimizer = LensOptimizer(config, {layer: self.parameters[layer] for layer in layers})
        rank, world = self.group.data_share
        with Producer(step_groups(sampler, config, self.step, rank, world)) as groups:
            for group in groups:
                # With more processes than layers, some have none.
                streams_of = self.capture.of_steps(group.steps) if layers else iter([()] * len(group.steps))
                for i, (data, streams) in enumerate(zip(group.steps, streams_of, strict=True)):
                    if group.first + i < self.step:  # done before the checkpoint from which the run goes on
                        continue
                    self._one_step(data, streams, layers, bar)
                    ended = self.step == config.num_steps
                    stopping = self.group.any(self.stop()) and not (ended and self.pass_index == len(self.passes) - 1)
                    if (self.checkpoint_every is not None and self.step % self.checkpoint_every == 0) or ended or stopping:
                        self._save(group.resumable(i))
                    if stopping:
                        raise TrainingInterruptedError(f"Stopped after step {self.step}.")

    def _warm_start(self, sampler: Sampler, layers: list[int]) -> None:
        rank, world = self.group.data_share
        data = sampler.take_step(self.config.warm_start_tokens, rank, world)
        solved = warm_start(self.capture.streams(data.sequences), layers, self.unembed.hidden_dim, self.config.ridge, self._total())
        for layer, parameters in solved.items():
            # From rank 0: others may round the solution otherwise.
            self.parameters[layer] = self._stored(parameters if self.group.layers_apart else self.group.shared(parameters))
        self.tokens += data.tokens

    def _total(self) -> Callable[..., list[mx.array]]:
        return self.group.total if self.group.share == "data" else lambda *values: list(values)

    def _one_step(self, data: Step, streams: Iterable[HiddenStates], layers: list[int], bar: Any) -> None:
        """Sum over the step's tokens, update every layer, tell everybody."""
        assert self.optimizer is not None
        start, config = time.perf_counter(), self.config
        sums = self._sums(streams, layers)
        if self.group.layers_apart:
            layers_told = self.passes_of_all[self.pass_index]
            names = len(parameters_of(self.lens.translators[self.layers[0]]))
            summed, norm = self.group.of_all_layers(layers, layers_told, to_list(sums.losses), sums.gradients, names)
        else:
            layers_told, summed, norm = layers, to_list(sums.losses), gradient_norm(sums.gradients)
        losses = [loss / data.tokens for loss in summed]
        scale = 1 / (data.tokens * (len(self.layers) if config.reduction == "mean" else 1))
        norm *= scale
        if math.isfinite(norm) and all(map(math.isfinite, losses)):
            clipped = scale * self.optimizer.clip(norm)
            for layer, gradient in zip(layers, sums.gradients, strict=True):
                self.parameters[layer] = self.optimizer.update(layer, self.parameters[layer], gradient, self.step, clipped)
        else:
            self.skipped += 1
            warnings.warn(
                f"Step {self.step} has a loss or gradient that is not finite; it is skipped and the lens left as it was. "
                "If this happens often, look for token ids outside the vocabulary or damaged weights.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.tokens += data.tokens
        loss = math.fsum(losses) / max(len(losses), 1)
        seconds = time.perf_counter() - start
        step = self.pass_index * config.num_steps + self.step
        rate = config.learning_rate_at(self.step)
        bar.set_postfix(step=f"{step + 1}/{len(self.passes) * config.num_steps}", KL=f"{loss:.3f}", refresh=False)
        bar.update(config.step_tokens)
        log.debug("step %d loss %.4f gradient norm %.4f", step, loss, norm)
        self.step += 1
        for listener in self.callbacks:
            listener.on_step(Progress(step, loss, losses, self.tokens, layers_told, norm, rate, data.tokens / seconds, self.skipped))

    def _sums(self, streams: Iterable[HiddenStates], layers: list[int]) -> Sums:
        """Over all tokens of the step, of all processes."""
        parameters = [self.parameters[layer] for layer in layers]
        sums = no_sums(layers)
        for stream in streams:
            accumulate(sums, parameters, stream, self.unembed)
        if not sums.gradients:  # a process without a share of a small step
            sums.gradients = [{name: mx.zeros(p.shape) for name, p in of_layer.items()} for of_layer in parameters]
        sums.losses = self.group.total_of_step(sums.losses, sums.gradients)
        return sums

    # Checkpoints

    def _folder(self) -> CheckpointFolder | None:
        """Where this process's state goes: with divided layers every process has a part of it."""
        if self.checkpoints is None or not self.group.layers_apart:
            return self.checkpoints
        return CheckpointFolder(self.checkpoints.path / f"rank-{self.group.rank}-of-{self.group.size}", self.checkpoints.keep)

    def _save(self, position: dict[str, Any]) -> None:
        folder = self._folder()
        if folder is None or not (self.group.writes or self.group.share == "layers"):
            return
        assert self.optimizer is not None
        arrays = {f"parameters.{layer}.{name}": p for layer, parameters in self.parameters.items() for name, p in parameters.items()}
        arrays |= {f"optimizer.{name}": a for name, a in self.optimizer.state().items()}
        record = {
            "pass": self.pass_index,
            "pass_step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "position": position,
            "config": self.config.to_dict(),
            "model": self._model(),
            "capture": self._captured_together(),
        }
        following = self.pass_index * self.config.num_steps + self.step
        path = folder.save(following, arrays, record)
        for listener in self.callbacks:
            listener.on_checkpoint(following, path)

    def _model(self) -> dict[str, Any]:
        """What of the model a checkpoint must agree with."""
        head = provenance_of(self.unembed)["head"]
        return {"layers": len(self.source), "width": self.unembed.hidden_dim, "vocabulary": self.unembed.vocab_size, "head": head}

    def _captured_together(self) -> dict[str, Any]:
        """What a position in the text means, and how sums are rounded."""
        return {"steps captured together": steps_together(self.config)}

    def _require_no_checkpoints(self) -> None:
        """A new run beside an old one's checkpoints would remove them, or be resumed from them."""
        folder = self._folder()
        if folder is not None and (steps := folder.steps()):
            raise InvalidValueError(
                f"{folder.path} has checkpoints already, the newest after step {steps[-1]}. Go on from it with resume, or give another folder."
            )

    def _require_no_checkpoints_of_others(self) -> None:
        """A run that was divided otherwise has its state elsewhere in the folder: not to find it would be to start anew."""
        if self.checkpoints is None:
            return
        ours = f"-of-{self.group.size}" if self.group.layers_apart else None
        parts = [path for path in sorted(self.checkpoints.path.glob("rank-*-of-*")) if any(path.glob("step-*"))]
        others = [path for path in parts if ours is None or not path.name.endswith(ours)]
        if others or (ours is not None and self.checkpoints.steps()):
            how = f"had its layers divided among {others[0].name.rpartition('-')[2]} processes" if others else "did not divide its layers"
            raise InvalidValueError(
                f"{self.checkpoints.path} has checkpoints of a run that {how}. Go on from them with as many processes that share the same, "
                "or give another folder."
            )

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint: rank 0's, or with divided layers the newest that every process has."""
        folder = self._folder()
        assert folder is not None
        path = folder.path
        with self.group.together():
            saved = folder.latest() if self.group.writes or self.group.layers_apart else None
        steps = self.group.gathered(-1 if saved is None else int(saved.record["step"]))
        if not self.group.layers_apart:
            record = self.group.gathered(None if saved is None else saved.record)[0]
            return None if record is None else Checkpoint(self.group.shared(None if saved is None else saved.arrays), record)
        if min(steps) < 0 <= max(steps):
            raise InvalidValueError(
                f"Processes {[rank for rank, step in enumerate(steps) if step < 0]} find no checkpoint in their {path.parent}, and others do. "
                "On several machines without a common disk every process must go on where it was. If the run ended while the first checkpoint was "
                "written, remove the folder and start anew."
            )
        if min(steps) < max(steps):  # some got further before the run ended
            with self.group.together():
                if steps[self.group.rank] > min(steps):
                    saved = folder.read(min(steps))
        return saved

    def _facts(self, resume: bool) -> dict[str, Any]:
        """What all processes must agree on."""
        about = {"model": self._model(), "text": self.corpus.identity(), "version of": {name: version(name) for name in ("metalens", "mlx")}}
        facts = {f"{of} {name}": value for of, what in about.items() for name, value in what.items()}
        run = {"share": self.group.share, "resume": resume, "checkpoint_every": self.checkpoint_every, "checkpoints": self.checkpoints is not None}
        return {**self.config.to_dict(), **run, **facts}

    def _restore(self, saved: Checkpoint, sampler: Sampler) -> None:
        record = saved.record
        for what, theirs, ours in (
            ("settings", record["config"], self.config.to_dict()),
            ("model", record["model"], self._model()),
            ("forward passes", record.get("capture", {}), self._captured_together()),
        ):
            as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}
            differ = [f"{name} was {theirs.get(name)!r} and is {as_json[name]!r}" for name in as_json if theirs.get(name) != as_json[name]]
            if differ:
                raise InvalidValueError(
                    f"The checkpoint is of a run with other {what}: {'; '.join(differ)}. Give the same, or start anew in another folder."
                )
        sampler.restore(record["position"])
        self.pass_index, self.step = int(record["pass"]), int(record["pass_step"])
        self.tokens, self.skipped = int(record["tokens"]), int(record["skipped"])
        for layer, parameters in self.parameters.items():
            self.parameters[layer] = {name: saved.arrays[f"parameters.{layer}.{name}"] for name in parameters}
        layers = self.passes[self.pass_index]
        self.optimizer = LensOptimizer(self.config, {layer: self.parameters[layer] for layer in layers})
        self.optimizer.restore({name.removeprefix("optimizer."): a for name, a in saved.arrays.items() if name.startswith("optimizer.")})

    def _whole_lens(self) -> TunedLens:
        """The lens with all layers, gathered one at a time where they are divided: in rank 0, others keep their own."""
        for i, layer in enumerate(self.layers):
            found = self.parameters.get(layer, {})
            if self.group.layers_apart:
                everywhere = self.group.shared(found, owner=i % self.group.size)
                found = everywhere if self.group.writes else found
            for name, value in found.items():
                setattr(self.lens.translators[layer], name, value.astype(mx.float32))
            mx.eval(parameters_of(self.lens.translators[layer]) if found else [])
        return self.lens
