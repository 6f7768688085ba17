"""metalens: tuned lenses for quantised language models in MLX."""

from importlib.metadata import version

from metalens.accelerate import Acceleration, accelerate
from metalens.evaluate import Evaluation, evaluate
from metalens.lens import LogitLens, TunedLens
from metalens.model import InterpretableModel, train_tuned_lens
from metalens.ops.backend import use_backend, use_precision, warn_if_slow
from metalens.training import TrainingConfig

__version__ = version("metalens")

warn_if_slow()

__all__ = [
    "Acceleration",
    "Evaluation",
    "InterpretableModel",
    "LogitLens",
    "TrainingConfig",
    "TunedLens",
    "accelerate",
    "evaluate",
    "train_tuned_lens",
    "use_backend",
    "use_precision",
]
