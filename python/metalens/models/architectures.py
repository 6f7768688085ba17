"""What cannot be seen by watching a model: which number of its configuration a factor is, norms and heads that are not modules, and why some
models have no residual stream to put a lens on. One line each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx

Settings = Mapping[str, Any]

# Factors that mlx-lm's models multiply the logits or the head's input with, as a function of their configuration (KeyError where it does not say).
FACTORS: dict[str, Callable[[Settings], float]] = {
    "logit_scale": lambda c: c["logit_scale"],
    "1 / logits_scaling": lambda c: 1 / c["logits_scaling"],
    "dim_model_base / hidden_size": lambda c: c["dim_model_base"] / c["hidden_size"],
    "output_multiplier": lambda c: c["output_multiplier"],
    "lm_head_multiplier / embedding_multiplier": lambda c: c["lm_head_multiplier"] / c["embedding_multiplier"],
}

# Names of the c in c * tanh(logits / c).
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

# Softcaps that are in a model's code and not in its configuration.
SOFTCAPS_IN_CODE = {"nanochat": 15.0}

# Final norms that are functions, not modules: RMS without a weight, by model type the eps, given the configuration.
FUNCTIONS: dict[str, Callable[[Settings], float]] = {
    "nanochat": lambda c: 1e-5,
    "talkie": lambda c: c["rms_norm_eps"],
}

# Heads that are arrays, not modules: by model type, (U [V, D], its path, the factor of the logits).
ARRAYS: dict[str, Callable[[Any], tuple[mx.array, str, float]]] = {
    "talkie": lambda model: (model.lm_head, "lm_head", float(model.lm_head_gain.w_g.item())),
}

# Why a model is refused, said beside what the check found: by model type.
REASONS: dict[str, str] = {
    "deepseek_v41": "its blocks hand on several streams (hyper-connections), which are mixed after the last one",
    "gemma3n": "its blocks hand on four streams (AltUp), which are rescaled and averaged after the last one",
    "iquestloopcoder": "it goes through its blocks' parts twice and never calls a block",
    "kimi_k3": "its blocks start new sums, which attention over all of them mixes after the last one",
    "nanbeige": "with num_loops above 1 it goes through its blocks several times",
    "phi3small": "it sets the logits of some ids in the middle of its vocabulary to minus infinity, which no Head can express",
    "prism_hadamard_qwen35": "its head rotates what it is given (Hadamard) before it multiplies, which no Head can express",
}


def settings(model: Any) -> Iterator[Settings]:
    """The configurations of a model: its own, that of the language model in it, that of the text in either."""
    for holder in (model, getattr(model, "language_model", None), getattr(model, "model", None)):
        for name in ("args", "config"):
            found = getattr(holder, name, None)
            values = found if isinstance(found, dict) else getattr(found, "__dict__", None)
            if isinstance(values, dict):
                yield values
                text = values.get("text_config")
                text = text if isinstance(text, dict) else getattr(text, "__dict__", None)
                if isinstance(text, dict):
                    yield text


def model_type(model: Any) -> str:
    """As its configuration says; "" for a model that has none."""
    return next((str(found["model_type"]) for found in settings(model) if found.get("model_type")), "")


def factors(model: Any) -> dict[str, float]:
    """What the configuration offers as factors, by name; 1 is none."""
    found: dict[str, float] = {}
    for values in settings(model):
        for name, factor in FACTORS.items():
            try:
                value = float(factor(values))
            except (KeyError, TypeError, ZeroDivisionError):
                continue
            if value not in (0.0, 1.0):
                found[name] = value
    return found


def softcaps(model: Any) -> dict[str, float]:
    """What configuration and code offer as softcaps, by name."""
    found = {name: float(values[name]) for values in settings(model) for name in SOFTCAPS if values.get(name)}
    if cap := SOFTCAPS_IN_CODE.get(model_type(model)):
        found["the softcap in its code"] = cap
    return found
