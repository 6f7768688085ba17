"""Training a tuned lens: configuration, data, the gradient of one step, the loop."""

from metalens.training.config import TrainingConfig
from metalens.training.data import TokenSequences
from metalens.training.loop import Progress, train
from metalens.training.step import loss_and_gradient

__all__ = ["Progress", "TokenSequences", "TrainingConfig", "loss_and_gradient", "train"]
