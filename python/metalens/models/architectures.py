"""Facts about architectures that observing a model does not show.

These are: the configuration's number for a factor, norms and heads that are not modules, and the reasons why some models have no residual
stream that a lens can read. Each fact is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx

Settings = Mapping[str, Any]

# Factors by which mlx-lm's models multiply the logits or the head's input: functions of the configuration (KeyError if it has no such number).
FACTORS: dict[str, Callable[[Settings], float]] = {
    "logit_scale": lambda c: c["logit_scale"],
    "1 / logits_scaling": lambda c: 1 / c["logits_scaling"],
    "dim_model_base / hidden_size": lambda c: c["dim_model_base"] / c["hidden_size"],
    "output_multiplier": lambda c: c["output_multiplier"],
    "lm_head_multiplier / embedding_multiplier": lambda c: c["lm_head_multiplier"] / c["embedding_multiplier"],
}

# Names, in the configuration, of the c in c * tanh(logits / c).
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

# {model type: softcap} for softcaps that are in a model's code and not in its configuration.
SOFTCAPS_IN_CODE = {"nanochat": 15.0}

# {model type: function of the configuration that returns eps} for final norms that are functions, not modules: RMS without a weight.
FUNCTIONS: dict[str, Callable[[Settings], float]] = {
    "nanochat": lambda c: 1e-5,
    "talkie": lambda c: c["rms_norm_eps"],
}

# {model type: function of the model that returns (U [V, D], its path, the factor of the logits)} for heads that are arrays, not modules.
ARRAYS: dict[str, Callable[[Any], tuple[mx.array, str, float]]] = {
    "talkie": lambda model: (model.lm_head, "lm_head", float(model.lm_head_gain.w_g.item())),
}

# {model type: why a lens cannot read it}. Error messages give this reason beside the result of the check.
REASONS: dict[str, str] = {
    "deepseek_v41": "its blocks return several residual streams (hyper-connections), which are mixed after the last block",
    "gemma3n": "its blocks return four residual streams (AltUp), which are rescaled and averaged after the last block",
    "iquestloopcoder": "it runs the parts of its blocks twice and never calls a block",
    "kimi_k3": "its blocks start new sums, and attention over all these sums mixes them after the last block",
    "nanbeige": "with num_loops above 1 it runs its blocks several times",
    "phi3small": "it sets the logits of some ids in the middle of its vocabulary to minus infinity, which metalens cannot express",
    "prism_hadamard_qwen35": "its head rotates its input (Hadamard) before the product, which metalens cannot express",
}


def settings(model: Any) -> Iterator[Settings]:
    """Yield the configurations of a model: its own, that of the language model inside it, and the text part of each."""
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
    """Return the model type in the configuration; "" if the model has no configuration."""
    return next((str(found["model_type"]) for found in settings(model) if found.get("model_type")), "")


def factors(model: Any) -> dict[str, float]:
    """Return the factors that the configuration offers, by name, without those that are 0 or 1."""
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
    """Return the softcaps that the configuration and the model's code offer, by name."""
    found = {name: float(values[name]) for values in settings(model) for name in SOFTCAPS if values.get(name)}
    if cap := SOFTCAPS_IN_CODE.get(model_type(model)):
        found["the softcap in its code"] = cap
    return found
