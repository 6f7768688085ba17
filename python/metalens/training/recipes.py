"""Recipes: named settings that are known to work. A new recipe is a new entry of RECIPES.

docs/recipes.md compares them on two models.
"""

from __future__ import annotations

from typing import Any

from metalens.training.config import TrainingConfig
from metalens.utils.errors import InvalidValueError

# {name: settings}. Learning rates belong to a reduction: a sum over layers gives every layer the gradient of its own loss.
RECIPES: dict[str, dict[str, Any]] = {
    # Belrose et al. 2023 as tuned-lens's code runs it: lr 1.0 (1 - momentum), joint clip, decay of 1e-3 toward the identity, sum over layers.
    "paper": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "gradient_clip": 1.0,
        "weight_decay": 1e-3,
        "reduction": "sum",
        "num_steps": 250,
        "tokens_per_step": 2**18,
        "guard_tokens": 512,
    },
    # mlxterp's Tutorial 2, which holds nothing back: one sequence per step, in the order of the text, lr 1.0 on the mean over layers.
    "mlxterp": {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.9, "gradient_clip": 1.0, "num_steps": 250, "seed": None},
    # tuned-lens's second optimizer, without its amsgrad.
    "adam": {
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "gradient_clip": 1.0,
        "weight_decay": 1e-3,
        "reduction": "sum",
        "num_steps": 250,
        "tokens_per_step": 2**18,
        "guard_tokens": 512,
    },
    # The closed form, then Muon in many small steps, pulled toward the identity. With few tokens the number of steps and the pull decide, not the
    # size of a batch (docs/recipes.md). In 400 steps the pull shrinks what is not learned anew by a factor exp(-0.025 * 0.15 * 400 / 2) = 0.47
    # where the distance is 1. Rates in proportion to the distance save a fifth of the steps on the demo model (mean KL after 280 steps with equal
    # rates 0.7692; after 240 with the power 1/2, 3/4, 1, 1.3 of the distance: 0.7670, 0.7658, 0.7651, 0.7669).
    "fast": {
        "optimizer": "muon",
        "learning_rate": 0.025,
        "momentum": 0.8,
        "weight_decay": 0.15,
        "layer_rates": "distance",
        "reduction": "sum",
        "num_steps": 400,
        "tokens_per_step": 2**14,
        "warm_start_tokens": 2**16,
        "guard_tokens": 512,
    },
    # The paper's last version recommends Muon.
    "muon": {
        "optimizer": "muon",
        "learning_rate": 0.02,
        "momentum": 0.9,
        "reduction": "sum",
        "num_steps": 250,
        "tokens_per_step": 2**15,
        "guard_tokens": 512,
    },
}
# The closed form alone: no step, and so no product with the head. With steps it is `fast`.
RECIPES["ridge"] = RECIPES["fast"] | {"num_steps": 0}


def settings_of(name: str) -> dict[str, Any]:
    """Return the settings of a recipe by name.

    Raises:
        InvalidValueError: for an unknown recipe; names the known ones.
    """
    if name not in RECIPES:
        raise InvalidValueError(f"Unknown recipe {name!r}. Known recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]


def recipe(name: str, **settings: Any) -> TrainingConfig:
    """Return the configuration of a recipe.

    Args:
        name: 'fast', 'ridge', 'paper', 'mlxterp', 'adam' or 'muon'.
        settings: settings of TrainingConfig that replace the recipe's.

    Raises:
        InvalidValueError: for an unknown recipe or setting, and for settings out of range.
    """
    return TrainingConfig.from_dict({**settings_of(name), **settings})
