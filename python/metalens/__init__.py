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
    "Evaluation": "metalens.evaluation.results",
    "InterpretableModel": "metalens.model",
    "LogitLens": "metalens.lenses.lens",
    "Reading": "metalens.readings.reading",
    "TrainingConfig": "metalens.training.config",
    "TunedLens": "metalens.lenses.lens",
    "accelerate": "metalens.models.acceleration",
    "evaluate": "metalens.evaluation.evaluator",
    "load": "metalens.model",
    "plan": "metalens.estimate.memory",
    "recipe": "metalens.training.recipes",
    "train_tuned_lens": "metalens.model",
    "use_backend": "metalens.ops.backends",
    "use_precision": "metalens.ops.backends",
}

__all__ = [
    "Acceleration",
    "Evaluation",
    "InterpretableModel",
    "LogitLens",
    "Reading",
    "TrainingConfig",
    "TunedLens",
    "accelerate",
    "evaluate",
    "load",
    "plan",
    "recipe",
    "train_tuned_lens",
    "use_backend",
    "use_precision",
]

if TYPE_CHECKING:
    from metalens.estimate.memory import plan
    from metalens.evaluation.evaluator import evaluate
    from metalens.evaluation.results import Evaluation
    from metalens.lenses.lens import LogitLens, TunedLens
    from metalens.model import InterpretableModel, load, train_tuned_lens
    from metalens.models.acceleration import Acceleration, accelerate
    from metalens.ops.backends import use_backend, use_precision
    from metalens.readings.reading import Reading
    from metalens.training.config import TrainingConfig
    from metalens.training.recipes import recipe

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
