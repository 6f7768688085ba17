"""Going on from a checkpoint: where each process keeps its checkpoints, and whether they belong to the run.

Processes that divide the text have the same state, and rank 0 writes it. Processes that divide the layers write a part each, in folders
rank-<rank>-of-<size>, and go on from the newest step that all of them have.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metalens.lenses.provenance import provenance_of
from metalens.models.capture import ResidualCapture
from metalens.models.unembed import Unembed
from metalens.models.weights import weights_hash
from metalens.ops.backends import given_precision, precision
from metalens.training.batching import steps_together
from metalens.training.checkpoint import RECORD, Checkpoint, CheckpointFolder, parts_of
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus
from metalens.training.distributed import Group
from metalens.training.state import TrainingState
from metalens.training.vocabulary import sample_size
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True)
class RunFacts:
    """Facts that a run must have in common with its checkpoint, and all its processes with each other.

    Attributes:
        config: the settings.
        source: captures the model's hidden states.
        unembed: the model's norm and head.
        start: hash of the lens that the run starts from. None = the identity, or the warm start.
    """

    config: TrainingConfig
    source: ResidualCapture
    unembed: Unembed
    start: str | None = None

    @cached_property
    def weights(self) -> str:
        """Return the hash of all weights of the model. A run does not change them."""
        return weights_hash(self.source.model) if self.source.sharding is None else self.source.sharding.weights_hash

    def model(self) -> dict[str, Any]:
        """Return the sizes of the model, the hash of its head and the hash of all weights."""
        head = provenance_of(self.unembed)["head"]
        sizes = {"layers": len(self.source), "width": self.unembed.hidden_dim, "vocabulary": self.unembed.vocab_size}
        return {**sizes, "head": head, "weights": self.weights}

    def record(self) -> dict[str, Any]:
        """Return the facts for the record of a checkpoint.

        "capture" says what a position in the text means, and how sums are rounded.
        """
        capture = {"steps captured together": steps_together(self.config)}
        return {"config": self.config.to_dict(), "model": self.model(), "capture": capture, "precision": self.precision(), "start": self.start}

    def precision(self) -> str:
        """Return the precision of products: the setting, or "not set" if then some of the run's products have a precision of their own."""
        sampled = sample_size(self.config.vocabulary, self.unembed.head.tokens) is not None
        return given_precision() or ("not set" if sampled or self.config.optimizer == "muon" else precision())

    def require_record(self, record: Mapping[str, Any]) -> None:
        """Check that the record of a checkpoint has the facts of this run.

        Raises:
            InvalidValueError: if it does not; names the differences.
        """
        for what, name in (("settings", "config"), ("model", "model"), ("forward passes", "capture")):
            theirs, ours = record.get(name, {}), self.record()[name]
            if name == "config":  # an older version has fewer settings, and does what their defaults say
                theirs = {each.name: each.default for each in fields(TrainingConfig)} | theirs
            if name == "model" and "weights" not in theirs:  # a checkpoint of version 0.1.0
                ours = {key: value for key, value in ours.items() if key != "weights"}
            as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()}
            differ = [f"{key} was {theirs.get(key)!r} and is {as_json[key]!r}" for key in as_json if theirs.get(key) != as_json[key]]
            if differ:
                raise InvalidValueError(
                    f"The checkpoint is of a run with other {what}: {'; '.join(differ)}. Use the same, or start anew in another folder."
                )
        if record.get("precision", self.precision()) != self.precision():  # an older version did not write it
            raise InvalidValueError(
                f"The checkpoint is of a run with another precision: it was {record['precision']} and is {self.precision()}. "
                "Set METALENS_PRECISION or use_precision as it was, or start anew in another folder."
            )
        if record.get("start") != self.start:
            before, now = ("no lens" if start is None else f"the lens {start}" for start in (record.get("start"), self.start))
            raise InvalidValueError(f"The checkpoint is of a run that started from {before}, and this one starts from {now}. Start from the same.")

    def require_same_in_group(self, group: Group, corpus: Corpus, **arguments: Any) -> None:
        """Check that all processes of a group run with the same facts, text, precision, package versions and arguments.

        Raises:
            InvalidValueError: in every process; names the differences.
        """
        if group.size == 1:
            return
        about = {"model": self.model(), "text": corpus.identity(), "version of": {name: version(name) for name in ("metalens", "mlx")}}
        facts = {f"{of} {name}": value for of, values in about.items() for name, value in values.items()}
        group.require_same({**self.config.to_dict(), "parallel": group.parallel, "precision": self.precision(), **arguments, **facts})


def with_older_defaults(config: TrainingConfig, folder: Path | None, group: Group) -> TrainingConfig:
    """Return the settings for going on from the newest checkpoint in a folder: those that its version did not have are as they were without them."""
    known = group.gather_json(_settings_of_newest(folder))[0]
    added: dict[str, Any] = {each.name: each.default for each in fields(config) if known and each.name not in known}
    return replace(config, **added)


def _settings_of_newest(folder: Path | None) -> list[str]:
    """Return the names of the settings in the newest record that can be read; [] if there is none."""
    records = [] if folder is None else sorted(folder.glob(f"**/step-*/{RECORD}"), key=lambda path: path.parent.name)
    for path in reversed(records):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return list(json.loads(path.read_text())["config"])
    return []


class RunCheckpoints:
    """The checkpoints of a run, in one process of its group.

    Args:
        root: folder of the run. None = write no checkpoints.
        group: processes of the run.
        facts: facts of the run.
    """

    def __init__(self, root: CheckpointFolder | None, group: Group, facts: RunFacts) -> None:
        self.root, self.group, self.facts = root, group, facts
        self.folder = root
        if root is not None and group.divides_layers:
            self.folder = CheckpointFolder(root.path / f"rank-{group.rank}-of-{group.size}", root.keep)

    def require_place(self, resume: bool) -> None:
        """Check, in all processes together, that the run may write its checkpoints here.

        Raises:
            InvalidValueError: if there are checkpoints of a run that was divided otherwise, or any checkpoints for a run that does not resume.
        """
        with self.group.together():
            self._require_same_division()
            if not resume and self.folder is not None and (steps := self.folder.steps()):
                # A new run would remove them, or be resumed from them.
                raise InvalidValueError(
                    f"{self.folder.path} has checkpoints already, the newest after step {steps[-1]}. "
                    "Go on from it with resume, or give another folder."
                )

    def _require_same_division(self) -> None:
        """Check that no run that was divided otherwise has its state elsewhere in the folder: this one would start anew beside it."""
        if self.root is None:
            return
        ours = f"-of-{self.group.size}" if self.group.divides_layers else None
        parts = [part.path for part in parts_of(self.root.path)]
        others = [path for path in parts if ours is None or not path.name.endswith(ours)]
        if others or (ours is not None and self.root.steps()):
            how = f"had its layers divided among {others[0].name.rpartition('-')[2]} processes" if others else "did not divide its layers"
            raise InvalidValueError(
                f"{self.root.path} has checkpoints of a run that {how}. Go on from them with as many processes and the same division, "
                "or give another folder."
            )

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint: rank 0's, or with divided layers that of the newest step that every process has. None = no checkpoint.

        Raises:
            InvalidValueError: if some processes have checkpoints and others have none.
        """
        if self.folder is None:
            return None
        group = self.group
        with group.together():
            saved = self.folder.latest() if group.writes or group.divides_layers else None
            if saved is not None and not group.divides_layers:  # a run that was killed after its last step may have left one more
                self.folder.remove_oldest(int(saved.record["step"]))
        steps = group.gather_json(-1 if saved is None else int(saved.record["step"]))
        if not group.divides_layers:
            record = group.gather_json(None if saved is None else saved.record)[0]
            return None if record is None else Checkpoint(group.broadcast(None if saved is None else saved.arrays), record)
        if min(steps) < 0 <= max(steps):
            raise InvalidValueError(
                f"Processes {[rank for rank, step in enumerate(steps) if step < 0]} find no checkpoint in their {self.folder.path.parent}, and "
                "others do. Without a common disk every process must go on, on the machine where it was. If the run ended while the first "
                "checkpoint was written, remove the folder and start anew."
            )
        if min(steps) < max(steps):  # some processes got further before the run ended
            with group.together():
                if steps[group.rank] > min(steps):
                    saved = self.folder.read(min(steps))
        return saved

    def save(self, state: TrainingState, position: Mapping[str, Any]) -> tuple[int, Path] | None:
        """Write the state of this process, if it is its turn to write. Return the number of the next step and the folder.

        Args:
            state: the state.
            position: position in the text from which a run goes on.
        """
        if self.folder is None or not (self.group.writes or self.group.parallel == "layers"):
            return None
        step = state.pass_index * self.facts.config.num_steps + state.step
        return step, self.folder.save(step, state.arrays(), {**state.numbers(), "position": dict(position), **self.facts.record()})
