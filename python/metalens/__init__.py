"""metalens: tuned lenses for quantized language models in MLX.

Names are imported when they are first used (PEP 562): `import metalens` loads neither mlx_lm, transformers nor matplotlib, and runs no kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metalens import _moved

# {public name: the module that defines it}
_DEFINED_IN = {
    "Acceleration": "metalens.models.acceleration",
    "Comparison": "metalens.readings.comparison",
    "Evaluation": "metalens.evaluation.results",
    "InterpretableModel": "metalens.model",
    "LogitLens": "metalens.lenses.lens",
    "MetalensError": "metalens.utils.errors",
    "Plan": "metalens.estimate.results",
    "Reading": "metalens.readings.reading",
    "Scores": "metalens.evaluation.scores",
    "TopToken": "metalens.readings.top_tokens",
    "TrainingConfig": "metalens.training.config",
    "Trajectory": "metalens.readings.trajectory",
    "TunedLens": "metalens.lenses.lens",
    "accelerate": "metalens.models.acceleration",
    "convert": "metalens.compat.tuned_lens.conversion",
    "evaluate": "metalens.evaluation.evaluator",
    "load": "metalens.model",
    "load_lens": "metalens.compat.tuned_lens.conversion",
    "plan": "metalens.estimate.memory",
    "recipe": "metalens.training.recipes",
    "train": "metalens.training.run",
    "train_tuned_lens": "metalens.model",
    "use_backend": "metalens.ops.backends",
    "use_precision": "metalens.ops.backends",
}

__all__ = [
    "Acceleration",
    "Comparison",
    "Evaluation",
    "InterpretableModel",
    "LogitLens",
    "MetalensError",
    "Plan",
    "Reading",
    "Scores",
    "TopToken",
    "TrainingConfig",
    "Trajectory",
    "TunedLens",
    "accelerate",
    "convert",
    "evaluate",
    "load",
    "load_lens",
    "plan",
    "recipe",
    "train",
    "train_tuned_lens",
    "use_backend",
    "use_precision",
]

if TYPE_CHECKING:
    from metalens.compat.tuned_lens.conversion import convert, load_lens
    from metalens.estimate.memory import plan
    from metalens.estimate.results import Plan
    from metalens.evaluation.evaluator import evaluate
    from metalens.evaluation.results import Evaluation
    from metalens.evaluation.scores import Scores
    from metalens.lenses.lens import LogitLens, TunedLens
    from metalens.model import InterpretableModel, load, train_tuned_lens
    from metalens.models.acceleration import Acceleration, accelerate
    from metalens.ops.backends import use_backend, use_precision
    from metalens.readings.comparison import Comparison
    from metalens.readings.reading import Reading
    from metalens.readings.top_tokens import TopToken
    from metalens.readings.trajectory import Trajectory
    from metalens.training.config import TrainingConfig
    from metalens.training.recipes import recipe
    from metalens.training.run import train
    from metalens.utils.errors import MetalensError

_moved.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("metalens")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'metalens' has no attribute {name!r}")
    value = getattr(import_module(_DEFINED_IN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
