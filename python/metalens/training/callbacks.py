"""What a run says while it goes on: a record for each step, and those who listen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from metalens.training.config import TrainingConfig
from metalens.utils.errors import MissingPackageError
from metalens.utils.files import atomic_write


@dataclass(frozen=True)
class Progress:
    """One step, as callbacks see it. Losses are from before the update, in nats per token.

    Attributes:
        step: counted from 0.
        loss: mean over layers.
        losses: one per trained layer.
        tokens: seen so far, this step's and the warm start's included.
        layers: the layers that the losses are of.
        gradient_norm: over all layers together, before clipping.
        learning_rate: of this step.
        tokens_per_second: of this step, capture included.
        skipped: steps so far that were left out because something was not finite.
    """

    step: int
    loss: float
    losses: list[float]
    tokens: int
    layers: list[int]
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    skipped: int


class Callback(Protocol):
    """Who wants to know. Every method may be left out by deriving from `Listener`."""

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Before the first step."""

    def on_step(self, progress: Progress) -> None:
        """After every step."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """After a checkpoint was written; `step` is the next one."""

    def on_end(self) -> None:
        """At the end, also of a run that failed."""


class Listener:
    """A Callback that does nothing."""

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Before the first step."""

    def on_step(self, progress: Progress) -> None:
        """After every step."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self) -> None:
        """At the end."""


class OnStep(Listener):
    """Calls a function after every step.

    Args:
        function: of the Progress.
    """

    def __init__(self, function: Callable[[Progress], None]) -> None:
        self.function = function

    def on_step(self, progress: Progress) -> None:
        """After every step."""
        self.function(progress)


class MetricsFile(Listener):
    """Writes every step as a line of JSON, with null for what is not finite. A resumed run cuts off what it will write again.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Keep the lines of the steps before the first one; a half-written last line falls away."""
        kept = []
        if first_step and self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    before = json.loads(line)["step"] < first_step
                except (ValueError, KeyError, TypeError):
                    break
                if before:
                    kept.append(line)
        with atomic_write(self.path) as temporary:  # a run that is killed here keeps what it had
            temporary.write_text("".join(line + "\n" for line in kept))

    def on_step(self, progress: Progress) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({name: _finite(value) for name, value in asdict(progress).items()}) + "\n")


class WandB(Listener):
    """Reports to Weights & Biases, through its own package.

    Args:
        project, name: of the run there.
        run_file: where the run's id is kept, so that a run that is resumed here goes on there; None = it becomes another one.
        module: the package; None = import it.

    Raises:
        ImportError: saying what to install, if it is missing.
    """

    def __init__(self, project: str, name: str | None = None, run_file: str | Path | None = None, module: Any = None) -> None:
        self.module = module or _imported("wandb", "wandb")
        self.project, self.name = project, name
        self.run_file = None if run_file is None else Path(run_file)
        self.run: Any = None

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Open the run."""
        known = self.run_file.read_text(encoding="utf-8") if first_step and self.run_file is not None and self.run_file.exists() else None
        self.run = self.module.init(project=self.project, name=self.name, id=known, config=config.to_dict(), resume="allow")
        if self.run_file is not None:
            self.run_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.run_file) as path:
                path.write_text(str(self.run.id), encoding="utf-8")

    def on_step(self, progress: Progress) -> None:
        """Log the step."""
        self.run.log(_scalars(progress), step=progress.step)

    def on_end(self) -> None:
        """Close the run."""
        if self.run is not None:
            self.run.finish()


class TensorBoard(Listener):
    """Writes events for TensorBoard, through torch's or tensorboardX's writer.

    Args:
        folder: for the events.
        writer: a SummaryWriter; None = make one.

    Raises:
        ImportError: saying what to install, if there is no writer.
    """

    def __init__(self, folder: str | Path, writer: Any = None) -> None:
        self.writer = writer or _imported("tensorboardX", "tensorboardX").SummaryWriter(str(folder))

    def on_step(self, progress: Progress) -> None:
        """Log the step."""
        for name, value in _scalars(progress).items():
            self.writer.add_scalar(name, value, progress.step)

    def on_end(self) -> None:
        """Write what is left."""
        self.writer.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(progress: Progress) -> dict[str, float]:
    by_layer = {f"kl/layer_{layer}": loss for layer, loss in zip(progress.layers, progress.losses, strict=True)}
    names = ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "tokens", "skipped")
    return {**{name: float(getattr(progress, name)) for name in names}, **by_layer}


def _imported(name: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"Reporting to {name} needs its package: pip install {package}.") from error
