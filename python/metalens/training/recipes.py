"""Recipes: named settings that are known to work. A new recipe is a new entry of RECIPES.

docs/recipes.md compares them on four models.
"""

from __future__ import annotations

from typing import Any

from metalens.training.config import TrainingConfig
from metalens.utils.errors import InvalidValueError

# {name: settings}. Learning rates belong to a reduction: a sum over layers gives every layer the gradient of its own loss.
RECIPES: dict[str, dict[str, Any]] = {
    # Belrose et al. 2023 as tuned-lens's code runs it: lr 1.0 (1 - momentum), decay of 1e-3 toward the identity, sum over layers, and a
    # joint clip, which the embedding's translator takes part in.
    "paper": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "gradient_clip": 1.0,
        "weight_decay": 1e-3,
        "reduction": "sum",
        "num_steps": 250,
        "tokens_per_step": 2**18,
        "embedding": True,
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
        "embedding": True,
        "guard_tokens": 512,
    },
    # The closed form, then Muon in many small steps that are as long as the loss asks for, pulled toward the identity. With few tokens the number of
    # steps and the pull decide, not the size of a batch (docs/recipes.md). By its own gradient a step takes 12 % off a layer's loss: one constant for
    # all layers of all models. Trials with steps of 128 tokens, mean KL of the layers:
    #   learning rate 0.07, 0.1, 0.15, 0.2    small, 80 steps: 0.876, 0.867, 0.865, 0.869; 240 steps: -, 0.791, 0.795, -
    #                                         SmolLM2-135M-Instruct, layers 0, 11, 22, 80 steps: -, 2.306 (BIAS 0.1), 2.236, 2.235
    #   weight decay 0, 0.04, 0.15            SmolLM2: 2.241, 2.236 (rate 0.15); -, 2.306, 2.368 (rate 0.1)
    #   momentum 0.7, 0.8, 0.87               small, 240 steps, as the recipe was before: 0.829, 0.826, 0.828
    # Tokens of 4096 shuffled, in random order, beside steps of one sequence each (mean of 2 to 4 seeds; one for the code of the last two):
    #   text help, code                       demo -0.1 %, -1.8 %; small -0.1 %, -1.3 %; SmolLM2 -0.8 %, -1.6 %; Gemma 3 -0.5 %, -0.5 %
    #   tokens 512, 2048, 4096, 8192, 16384   small, help: 0.0, 0.0, -0.1, -0.1, 0.0 %; code: -0.7, -1.1, -1.3, -1.0, -1.0 %
    # With them, weight decay 0.03 beside 0.04: demo +0.1 %, +0.2 %; small -0.1 %, -0.1 %; SmolLM2 -0.1 %, -0.1 %; Gemma 3 0.0 %.
    # A mean of the last iterates, coordinates about the mean of the hidden states, a pull toward the warm start and a regression whose rows are
    # weighted by 1 / |h*| were worse or no better.
    # What the sampled vocabulary costs: docs/sampled-vocabulary.md.
    "fast": {
        "optimizer": "muon",
        "step_size": "loss",
        "learning_rate": 0.12,
        "momentum": 0.8,
        "weight_decay": 0.03,
        "layer_rates": "equal",
        "vocabulary": "sampled",
        "reduction": "sum",
        "num_steps": 400,
        "tokens_per_step": 2**14,
        "shuffle_tokens": 2**12,
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
        name: name of a recipe, a key of RECIPES.
        settings: settings of TrainingConfig that replace the recipe's.

    Raises:
        InvalidValueError: for an unknown recipe or setting, and for settings out of range.
    """
    return TrainingConfig.from_dict({**settings_of(name), **settings})
