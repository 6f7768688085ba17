"""Training a tuned lens: settings and recipes, data, the gradient of one step, the optimizer, the loop, checkpoints, several machines."""

from metalens.training.callbacks import Callback, Listener, MetricsFile, Progress, TensorBoard, WandB
from metalens.training.checkpoint import Checkpoint, CheckpointFolder
from metalens.training.config import RECIPES, TrainingConfig, recipe
from metalens.training.data import Corpus, NotEnoughDataError, Sampler, open_corpus
from metalens.training.distributed import Group
from metalens.training.loop import TrainingInterruptedError, train
from metalens.training.step import loss_and_gradient

__all__ = [
    "RECIPES",
    "Callback",
    "Checkpoint",
    "CheckpointFolder",
    "Corpus",
    "Group",
    "Listener",
    "MetricsFile",
    "NotEnoughDataError",
    "Progress",
    "Sampler",
    "TensorBoard",
    "TrainingConfig",
    "TrainingInterruptedError",
    "WandB",
    "loss_and_gradient",
    "open_corpus",
    "recipe",
    "train",
]
