"""Progress records of a training run, and the callbacks that receive them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from metalens.models.layers import EMBEDDING, Layer
from metalens.training.config import TrainingConfig
from metalens.utils.errors import InvalidTypeError, MissingPackageError
from metalens.utils.files import atomic_write, naming
from metalens.utils.outputs import Output, require_replaceable


@dataclass(frozen=True)
class Progress:
    """The record of one step. Its losses are from before the update, in nats per token.

    With a sampled vocabulary (`TrainingConfig.vocabulary`) losses and gradient are the estimates of the step's samples, about 1 % below the full ones
    on the mean.

    Attributes:
        step: number of the step, counted from 0 over all passes.
        loss: mean loss over layers.
        losses: loss of each trained layer, in the order of `layers`.
        tokens: tokens seen so far, those of this step and of the warm start included.
        layers: layers that are trained in this pass: numbers of blocks, and 'embedding'.
        gradient_norm: norm of the gradient over all layers together, before clipping.
        learning_rate: learning rate of the step.
        tokens_per_second: speed of the step, the forward pass of the model included.
        skipped: number of steps so far that were skipped because a loss or gradient was not finite.
    """

    step: int
    loss: float
    losses: list[float]
    tokens: int
    layers: list[Layer]
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    skipped: int


class Callback:
    """Receives the events of a training run. Every method does nothing: override those that you need.

    Of the processes of a group only rank 0 has its callbacks called.
    """

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Receive the settings before the first step. `first_step` is not 0 in a run that was resumed."""

    def on_step(self, progress: Progress) -> None:
        """Receive the record of a step after it."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Receive the folder of a checkpoint after it was written. `step` is the next one."""

    def on_end(self) -> None:
        """Receive the end of the run, also of one that failed."""


class _EveryStep(Callback):
    """Calls a function after every step.

    Args:
        function: the function, of a Progress.
    """

    def __init__(self, function: Callable[[Progress], Any]) -> None:
        self.function = function

    def on_step(self, progress: Progress) -> None:
        self.function(progress)


def callbacks_of_process(given: Sequence[Callback | Callable[[Progress], Any]], rank: int) -> list[Callback]:
    """Return the callbacks that one process calls: a function in every process, a Callback in rank 0 alone.

    Raises:
        InvalidTypeError: for an object that is neither.
    """
    found: list[Callback] = []
    for each in given:
        if hasattr(each, "on_step"):
            found += [cast("Callback", each)] if rank == 0 else []
        elif callable(each):
            found.append(_EveryStep(each))
        else:
            raise InvalidTypeError(f"A callback is a metalens.training.Callback or a function of a Progress, not {type(each).__name__}.")
    return found


def metrics_output(path: str | Path) -> Output:
    """Return a file of metrics that is going to be written."""
    return Output(Path(path), "the metrics of a run", _is_metrics)


def _is_metrics(file: Path) -> bool:
    """Return whether a file begins with the line of a step, which may be half-written."""
    begins = b'{"step": '
    with file.open("rb") as opened:
        found = opened.read(len(begins))
    return begins.startswith(found)


class MetricsFile(Callback):
    """Writes every step as a line of JSON, with null for numbers that are not finite. A resumed run cuts off the lines that it will write again.

    Args:
        path: path of the file.
        force: replace a file that has no metrics.

    Raises:
        NotOursError: if the file exists and has no metrics.
    """

    def __init__(self, path: str | Path, *, force: bool = False) -> None:
        self.path = Path(path).expanduser()
        require_replaceable([metrics_output(self.path)], force=force)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Keep the lines of the steps before the first one. Drop a half-written last line."""
        kept = []
        if first_step and self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    before = json.loads(line)["step"] < first_step
                except (ValueError, KeyError, TypeError):
                    break
                if before:
                    kept.append(line)
        with atomic_write(self.path) as temporary:  # a run that is killed here keeps its lines
            temporary.write_text("".join(line + "\n" for line in kept))

    def on_step(self, progress: Progress) -> None:
        """Append a line."""
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps({name: _finite(value) for name, value in asdict(progress).items()}) + "\n")


class WandB(Callback):
    """Reports to Weights & Biases, through its package.

    Args:
        project, name: project and name of the run there.
        run_file: file with the id of the run, so that a run that is resumed here goes on there. None = it becomes another run.
        module: the package. None = import it.

    Raises:
        MissingPackageError: names the package to install.
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


class TensorBoard(Callback):
    """Writes events for TensorBoard, through the SummaryWriter of torch or tensorboardX.

    Args:
        folder: folder for the events.
        writer: a SummaryWriter. None = tensorboardX's.

    Raises:
        MissingPackageError: names the package to install.
    """

    def __init__(self, folder: str | Path, writer: Any = None) -> None:
        self.writer = writer or _imported("tensorboardX", "tensorboardX").SummaryWriter(str(folder))

    def on_step(self, progress: Progress) -> None:
        """Log the step."""
        for name, value in _scalars(progress).items():
            self.writer.add_scalar(name, value, progress.step)

    def on_end(self) -> None:
        """Write the remaining events."""
        self.writer.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(progress: Progress) -> dict[str, float]:
    layers = [layer if layer == EMBEDDING else f"layer_{layer}" for layer in progress.layers]
    by_layer = {f"loss/{layer}": loss for layer, loss in zip(layers, progress.losses, strict=True)}
    names = ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "tokens", "skipped")
    return {**{name: float(getattr(progress, name)) for name in names}, **by_layer}


def _imported(name: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"Reporting to {name} needs its package: pip install {package}.") from error
