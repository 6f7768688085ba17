"""Training a tuned lens: settings and recipes, data, the gradient of one step, the optimiser, the loop, checkpoints, several machines."""

from metalens.training.checkpoint import Checkpoint, CheckpointFolder
from metalens.training.config import RECIPES, TrainingConfig, recipe
from metalens.training.data import Corpus, NotEnoughData, Sampler, open_corpus
from metalens.training.distributed import Group
from metalens.training.loop import TrainingInterrupted, train
from metalens.training.progress import Callback, Listener, MetricsFile, Progress, TensorBoard, WandB
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
    "NotEnoughData",
    "Progress",
    "Sampler",
    "TensorBoard",
    "TrainingConfig",
    "TrainingInterrupted",
    "WandB",
    "loss_and_gradient",
    "open_corpus",
    "recipe",
    "train",
]
