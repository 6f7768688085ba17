"""Training a tuned lens: settings and recipes, data, the gradient of one step, the optimizer, the loop, checkpoints, several machines."""

from __future__ import annotations

from typing import Any

from metalens.training.callbacks import Callback, MetricsFile, Progress, TensorBoard, WandB
from metalens.training.checkpoint import Checkpoint, CheckpointFolder, UnfinishedRunError
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, NotEnoughDataError, Sampler, open_corpus
from metalens.training.distributed import Group
from metalens.training.interrupt import interruptible
from metalens.training.loop import TrainingInterruptedError, train_loop
from metalens.training.messages import GroupLostError
from metalens.training.recipes import RECIPES, recipe
from metalens.training.run import TrainingDivergedError, train
from metalens.training.step import loss_and_gradient

__all__ = [
    "RECIPES",
    "Callback",
    "Checkpoint",
    "CheckpointFolder",
    "Corpus",
    "Group",
    "GroupLostError",
    "MetricsFile",
    "NotEnoughDataError",
    "Progress",
    "Sampler",
    "TensorBoard",
    "TrainingConfig",
    "TrainingDivergedError",
    "TrainingInterruptedError",
    "UnfinishedRunError",
    "WandB",
    "interruptible",
    "loss_and_gradient",
    "open_corpus",
    "recipe",
    "train",
    "train_loop",
]


def __getattr__(name: str) -> Any:
    """Find a class by its name of version 0.1.0."""
    from metalens._moved import NAMES

    if NAMES.get(name) not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    message = f"{__name__}.{name} is now {NAMES[name]}; the old name will be removed in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return globals()[NAMES[name]]
