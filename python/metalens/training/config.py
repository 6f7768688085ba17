"""The settings of a training run, and the recipes: named settings that are known to work.

A run may be described by this object alone: two runs with equal settings on the same model, text and backend give the same lens, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metalens.utils.errors import InvalidValueError

MIN_SEQUENCE = 10  # tokens: mlxterp's bound

Optimizer = Literal["sgd", "adam", "muon"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a lens is trained. The defaults are mlxterp's: one sequence per step, SGD with Nesterov momentum, linear decay, clipped gradient.

    Attributes:
        num_steps: optimizer steps.
        max_seq_len: tokens per sequence, at least 10.
        tokens_per_step: rounded down to whole sequences; None = one sequence, as in mlxterp. The paper takes 2^18.
        learning_rate: at the first step after the warm-up.
        momentum: of SGD (Nesterov) and Muon; beta_1 of Adam.
        gradient_clip: largest norm of the gradient over all layers together; SGD and Adam.
        seed: None takes the sequences in their order, as mlxterp does; a number shuffles them anew in every pass over the data.
        optimizer: 'sgd', 'adam', or 'muon' (momentum, orthogonalized; its steps have unit spectral norm, so gradients are not clipped).
        weight_decay: of W - I and b, toward the identity: added to the clipped gradient (SGD, Adam), or times the learning rate (Muon).
        reduction: whether the loss is the mean over layers, or as upstream's the sum; each is a mean over tokens.
        schedule: after the warm-up 'linear' falls to 0 at the end of the run; 'constant' stays.
        warmup_steps: so many steps raise the learning rate linearly.
        warm_start_tokens: begin with the closed-form solution on so many tokens (see warm_start.py); 0 = begin with the identity.
        ridge: of the closed form, relative to the mean square of the states.
        repeat: go over the text again when it is used up; False = an error that says how much text the run needs.
        layers: the layers to train, others stay the identity; None = all.
        layers_at_once: train so many layers per pass over the data, one group after another, where not all fit; None = all.
        rank: of W - I = B A; None = a full matrix.
        bias_only: translate by a vector alone.
        layer_rates: 'equal', or after a warm start 'distance': a layer's learning rate is learning_rate times how far the warm start has moved
            it, the root mean square of the singular values of W - I. Early layers, which have a longer way to go, take longer steps.
        dtype: of parameters and optimizer state: 'float32', or 'bfloat16' with stochastic rounding.
        ns_steps: Muon's iterations; None = as many as the matrix's size asks for (see polar.py).
    """

    num_steps: int = 250
    max_seq_len: int = 2048
    tokens_per_step: int | None = None
    learning_rate: float = 1.0
    momentum: float = 0.9
    gradient_clip: float = 1.0
    seed: int | None = None
    optimizer: Optimizer = "sgd"
    weight_decay: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: int = 0
    warm_start_tokens: int = 0
    ridge: float = 1e-3
    repeat: bool = True
    layers: tuple[int, ...] | None = None
    layers_at_once: int | None = None
    rank: int | None = None
    bias_only: bool = False
    layer_rates: Literal["equal", "distance"] = "equal"
    dtype: Literal["float32", "bfloat16"] = "float32"
    ns_steps: int | None = None

    def __post_init__(self) -> None:
        if self.max_seq_len < MIN_SEQUENCE:
            raise InvalidValueError(f"max_seq_len ({self.max_seq_len}) is too small. Must be at least {MIN_SEQUENCE} tokens.")
        if self.num_steps < 0:
            raise InvalidValueError(f"num_steps must not be negative, got {self.num_steps}.")
        if not 0 <= self.momentum < 1:
            raise InvalidValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if not self.learning_rate > 0 or not self.gradient_clip > 0:
            raise InvalidValueError(f"learning_rate and gradient_clip must be positive, got {self.learning_rate} and {self.gradient_clip}.")
        if self.tokens_per_step is not None and self.tokens_per_step < self.max_seq_len:
            raise InvalidValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be at least max_seq_len ({self.max_seq_len}): steps are made of whole sequences."
            )
        self._check_choices()
        if self.bias_only and self.rank is not None:
            raise InvalidValueError("A lens is either of low rank or has biases only: give rank or bias_only, not both.")
        if self.warm_start_tokens and (self.bias_only or self.rank is not None):
            raise InvalidValueError("The warm start gives full matrices: set warm_start_tokens to 0 for rank or bias_only.")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not self.layers or len(set(self.layers)) < len(self.layers):
                raise InvalidValueError(f"layers must name at least one layer, each once, got {list(self.layers)}.")

    def _check_choices(self) -> None:
        for name, choices in (
            ("optimizer", ("sgd", "adam", "muon")),
            ("reduction", ("mean", "sum")),
            ("schedule", ("linear", "constant")),
            ("layer_rates", ("equal", "distance")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise InvalidValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("weight_decay", "ridge", "warmup_steps", "warm_start_tokens"):
            if not getattr(self, name) >= 0:
                raise InvalidValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("layers_at_once", "rank", "ns_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValueError(f"{name} must be at least 1, or None, got {value}.")

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees."""
        return 1 if self.tokens_per_step is None else self.tokens_per_step // self.max_seq_len

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.sequences_per_step * self.max_seq_len

    @property
    def total_tokens(self) -> int:
        """Tokens that one pass over the data needs, the warm start's included."""
        return self.num_steps * self.step_tokens + self.warm_start_tokens

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 - (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainingConfig:
        """Back from `to_dict`, or from a file of settings.

        Raises:
            ValueError: for a setting that does not exist, naming the ones that do.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(settings) - known:
            raise InvalidValueError(f"There is no setting {', '.join(sorted(unknown))}. Settings are: {', '.join(sorted(known))}.")
        return cls(**settings)


# Named settings. Learning rates go with the reduction: a sum over layers gives every layer the gradient of its own loss.
RECIPES: dict[str, dict[str, Any]] = {
    # Belrose et al. 2023 as upstream's code runs it: lr 1.0 (1 - momentum), joint clip, decay of 1e-3 toward the identity, sum over layers.
    "paper": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "gradient_clip": 1.0,
        "weight_decay": 1e-3,
        "reduction": "sum",
        "num_steps": 250,
        "tokens_per_step": 2**18,
    },
    # mlxterp's Tutorial 2: one sequence per step, in the text's order, lr 1.0 on the mean over layers.
    "mlxterp": {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.9, "gradient_clip": 1.0, "num_steps": 250},
    # Upstream's second optimizer, without its amsgrad.
    "adam": {
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "gradient_clip": 1.0,
        "weight_decay": 1e-3,
        "reduction": "sum",
        "num_steps": 250,
        "tokens_per_step": 2**18,
    },
    # The closed form, then Muon in many small steps, pulled toward the identity: with few tokens the number of steps and the pull decide, not the
    # size of a step's batch (docs/recipes.md). In 400 steps what is not learned anew shrinks by a factor exp(-0.025 * 0.15 * 400 / 2) = 0.47 where the
    # distance is 1. Rates in proportion to it save a fifth of the steps on the demo model (mean KL after 280 with equal rates 0.7692; with its power
    # 1/2, 3/4, 1, 1.3 after 240: 0.7670, 0.7658, 0.7651, 0.7669).
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
    },
    # What the paper's last version recommends.
    "muon": {"optimizer": "muon", "learning_rate": 0.02, "momentum": 0.9, "reduction": "sum", "num_steps": 250, "tokens_per_step": 2**15},
}


def recipe(name: str, **settings: Any) -> TrainingConfig:
    """The settings of a recipe, with some of them changed.

    Raises:
        ValueError: for a recipe that does not exist.
    """
    if name not in RECIPES:
        raise InvalidValueError(f"There is no recipe {name!r}. Recipes are: {', '.join(RECIPES)}.")
    return TrainingConfig.from_dict({**RECIPES[name], **settings})
