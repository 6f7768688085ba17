"""The settings of a training run.

`TrainingConfig` is the one place of a setting: its name, type, default, help and range are read from here by the command line, by files of settings
and by examples/train.toml. Two runs with equal settings on the same model, text and backend give the same lens, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from metalens.models.layers import Layer, layers_in_order
from metalens.utils.errors import InvalidValueError

Vocabulary = Literal["full", "sampled"] | int
MIN_SEQUENCE = 10  # tokens: mlxterp's bound
HELD_BACK = 16  # the guard's part of the tokens of a run, and of the sequences of a text, is at most a sixteenth


def natural_shift(loss: str) -> int:
    """Return the token_shift of a loss by its name: 0 for the model's prediction at the same position, 1 for the next token."""
    return int(loss == "ce")


def _setting(default: Any, help: str, *, at_least: int | None = None, unset: str | None = None, example: Any = None) -> Any:
    """Return a field of TrainingConfig.

    Args:
        default: the default.
        help: the setting in words: for the command line, for files of settings and for this class's docstring.
        at_least: the smallest value.
        unset: the meaning of None, if None is a value.
        example: a value to show where the default is None.
    """
    return field(default=default, metadata={"help": help, "at_least": at_least, "unset": unset, "example": example})


@dataclass(frozen=True)
class TrainingConfig:
    """How a lens is trained.

    The defaults are mlxterp's: one sequence per step, SGD with Nesterov momentum, linear decay, clipped gradient.

    Raises:
        InvalidValueError: for a setting that is out of range, or settings that exclude each other.
    """

    num_steps: int = _setting(250, "Optimizer steps.", at_least=0)
    max_seq_len: int = _setting(2048, "Tokens per sequence.", at_least=MIN_SEQUENCE)
    tokens_per_step: int | None = _setting(
        None, "Tokens per optimizer step, rounded down to whole sequences; 262144 in the paper.", at_least=1, unset="one sequence", example=16384
    )
    learning_rate: float = _setting(1.0, "Learning rate at the first step after the warm-up.")
    momentum: float = _setting(0.9, "Momentum of SGD (Nesterov) and Muon, beta_1 of Adam; below 1.")
    gradient_clip: float = _setting(1.0, "Largest gradient norm over all layers together, for SGD and Adam.")
    seed: int | None = _setting(
        None,
        "Seed that shuffles the sequences, anew in each pass over the text.",
        at_least=0,
        unset="the sequences keep the order of the text",
        example=0,
    )
    optimizer: Literal["sgd", "adam", "muon"] = _setting(
        "sgd", "Optimizer; muon takes orthogonalized steps of unit spectral norm and does not clip gradients."
    )
    weight_decay: float = _setting(
        0.0,
        "Decay of W - I and b, toward the identity: added to the clipped gradient (SGD, Adam), or multiplied by the learning rate (Muon).",
        at_least=0,
    )
    reduction: Literal["mean", "sum"] = _setting(
        "mean", "Reduction of the loss over layers; sum as in tuned-lens. The loss of a layer is a mean over tokens."
    )
    schedule: Literal["linear", "constant"] = _setting(
        "linear", "Learning rate after the warm-up: linear falls to 0 at the end of the run, constant stays."
    )
    warmup_steps: int = _setting(0, "Steps over which the learning rate rises linearly.", at_least=0)
    warm_start_tokens: int = _setting(0, "Tokens of the closed-form solution that training begins with; 0 = begin with the identity.", at_least=0)
    ridge: float = _setting(1e-3, "Ridge strength of the closed-form warm start, relative to the mean square of the hidden states.", at_least=0)
    repeat: bool = _setting(True, "Reuse the text when it runs out, instead of stopping with an error that says how much text the run needs.")
    shuffle_tokens: int = _setting(
        0,
        "Tokens whose hidden states are in memory together and are shuffled among the steps that they are for, so that a step has tokens of many "
        "places in the text; 0 = a step has whole sequences.",
        at_least=0,
    )
    loss_on: Literal["all", "answers"] = _setting(
        "all",
        "Tokens whose prediction counts in the loss and in all numbers of tokens of a run: all, or those of the answers in conversations "
        "(the assistant's messages, or the completion). The model reads whole sequences all the same.",
    )
    layers: tuple[int, ...] | None = _setting(None, "Layers to train; the other layers stay the identity.", unset="all layers", example=[0, 4, 5])
    layers_at_once: int | None = _setting(
        None, "Layers to train in one pass over the text, to save memory; the next layers follow in another pass.", at_least=1, unset="all", example=8
    )
    rank: int | None = _setting(None, "Rank of W - I = B A.", at_least=1, unset="a full matrix", example=256)
    bias_only: bool = _setting(False, "Train translators h + b, which have no matrix.")
    layer_rates: Literal["equal", "distance"] = _setting(
        "equal",
        "Learning rates of layers after a warm start: equal, or proportional to the distance that the warm start moved the layer "
        "(root mean square of the singular values of W - I), so that early layers take longer steps.",
    )
    guard_tokens: int = _setting(
        0,
        "Tokens that are held back from training, at most 1/16 of the text and of the run: a layer that gets worse on them goes back to its best "
        "state with half the rate, and at the end every layer has its best checked state. 0 = no guard.",
        at_least=0,
    )
    step_size: Literal["rate", "loss"] = _setting(
        "rate",
        "Length of Muon's steps: rate = the learning rate, in W; loss = so long that, by the gradient, a step takes the learning rate (0.1: a tenth) "
        "off the layer's loss, in coordinates that have the scale of the hidden states.",
    )
    dtype: Literal["float32", "bfloat16"] = _setting(
        "float32", "Type of parameters and optimizer state; bfloat16 is rounded stochastically and takes half the memory."
    )
    vocabulary: Literal["full", "sampled"] | int = _setting(
        "full",
        "Ids of the vocabulary that a step compares: full = all; sampled = two thirds of V up to 8192, at least 2048; 12 sqrt(V) from 49152 "
        "on; a line between; drawn anew for every 128 tokens, likely ones more often; a number = a sample of so many. A sample not smaller than "
        "the vocabulary is the full one.",
        at_least=16,
    )
    ns_steps: int | None = _setting(
        None, "Iterations of Muon's orthogonalization, of degree 5.", at_least=1, unset="chosen by the size of the matrix", example=4
    )
    embedding: bool = _setting(False, "Also train a translator for the embedding's output, the layer 0 of tuned-lens.")
    loss: Literal["kl", "ce"] = _setting(
        "kl", "Loss of a layer: kl = KL(model || lens), the model's own prediction; ce = cross-entropy of the tokens of the text."
    )
    token_shift: int | None = _setting(
        None,
        "Compare the lens at position t with the model's prediction (kl) or the text's token (ce) at position t + this.",
        unset="0 for kl, 1 for ce",
        example=0,
    )

    def __post_init__(self) -> None:
        self._check_types()
        if self.max_seq_len < MIN_SEQUENCE:
            raise InvalidValueError(f"max_seq_len ({self.max_seq_len}) is too small. Must be at least {MIN_SEQUENCE} tokens.")
        if self.tokens_per_step is not None and self.tokens_per_step < self.max_seq_len:
            raise InvalidValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be at least max_seq_len ({self.max_seq_len}): steps are made of whole sequences."
            )
        if not 0 <= self.momentum < 1:
            raise InvalidValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if not self.learning_rate > 0 or not self.gradient_clip > 0:
            raise InvalidValueError(f"learning_rate and gradient_clip must be positive, got {self.learning_rate} and {self.gradient_clip}.")
        self._check_fields()
        if self.bias_only and self.rank is not None:
            raise InvalidValueError("A lens is either of low rank or has biases only: give rank or bias_only, not both.")
        if self.warm_start_tokens and not self.num_steps and (self.bias_only or self.rank is not None):
            raise InvalidValueError(
                "The closed form gives full matrices: a lens of low rank or of biases needs steps (num_steps, and a recipe with steps)."
            )
        if self.warm_start_tokens and (self.bias_only or self.rank is not None):
            raise InvalidValueError("The warm start gives full matrices: set warm_start_tokens to 0 for rank or bias_only.")
        if self.step_size == "loss" and self.optimizer != "muon":
            raise InvalidValueError(f"step_size 'loss' is of the optimizer muon, not of {self.optimizer}: give step_size='rate'.")
        self._check_loss()
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise InvalidValueError(f"layers must name at least one layer, each once, got {list(self.layers)}.")

    def _check_loss(self) -> None:
        """Check the settings of a loss that is not 0 for the model itself (InvalidValueError)."""
        if abs(self.shift) >= self.max_seq_len:
            raise InvalidValueError(
                f"token_shift must be smaller than max_seq_len ({self.max_seq_len}), got {self.shift}: no position would be left."
            )
        if self.loss == "kl" and not self.shift:
            return
        what = f"loss '{self.loss}'" if self.loss != "kl" else "A token_shift"
        if self.step_size == "loss" or (self.loss == "ce" and self.vocabulary != "full"):
            raise InvalidValueError(
                f"{what} needs step_size 'rate' (its least loss is not 0)"
                f"{' and the full vocabulary (a sample may lack the token)' if self.loss == 'ce' else ''}: "
                "give the recipe paper, adam or muon, or these settings."
            )
        if self.shift and self.shuffle_tokens:
            raise InvalidValueError(f"{what} compares tokens of one sequence, which shuffle_tokens would part: set shuffle_tokens to 0.")
        if self.warm_start_tokens and self.shift != natural_shift(self.loss):
            raise InvalidValueError(
                "The warm start solves for the model's prediction at the same position: set warm_start_tokens to 0, or leave token_shift out."
            )

    def _check_types(self) -> None:
        """Check the type of every setting, so that no wrong one is found out in the middle of a run."""
        if self.layers is not None and not isinstance(self.layers, (str, bytes)) and isinstance(self.layers, Iterable):
            object.__setattr__(self, "layers", tuple(self.layers))
        for name, kind in setting_types().items():
            value = getattr(self, name)
            if not _is_of(value, kind):
                raise InvalidValueError(f"{name} can't be {value!r}; it takes {in_words(kind)}.")

    def _check_fields(self) -> None:
        """Check every setting against the choices of its type and its smallest value."""
        for each in fields(self):
            value, choices, smallest = getattr(self, each.name), choices_of(setting_types()[each.name]), each.metadata["at_least"]
            if isinstance(value, float) and not math.isfinite(value) and (each.name != "gradient_clip" or math.isnan(value)):
                raise InvalidValueError(f"{each.name} must be a finite number, got {value}.")
            if choices and isinstance(value, str) and value not in choices:
                or_number = "" if get_origin(setting_types()[each.name]) is Literal else ", or a whole number"
                raise InvalidValueError(f"{each.name} must be one of {', '.join(choices)}{or_number}, got {value!r}.")
            if smallest is not None and value is not None and not isinstance(value, str) and not value >= smallest:
                or_none = ", or None" if each.metadata["unset"] else ""
                raise InvalidValueError(f"{each.name} must be at least {smallest}{or_none}, got {value}.")

    @property
    def shift(self) -> int:
        """Return the positions between a prediction of the lens and what it is compared with."""
        return natural_shift(self.loss) if self.token_shift is None else self.token_shift

    def trained_layers(self, num_layers: int) -> list[Layer]:
        """Return the layers that a run trains on a model of so many blocks: 'embedding' first, if it is one of them."""
        blocks = range(num_layers) if self.layers is None else sorted(self.layers)
        return layers_in_order(blocks, self.embedding)

    @property
    def sequences_per_step(self) -> int:
        """Return the number of sequences in one optimizer step."""
        return 1 if self.tokens_per_step is None else self.tokens_per_step // self.max_seq_len

    @property
    def step_tokens(self) -> int:
        """Return the number of tokens in one optimizer step."""
        return self.sequences_per_step * self.max_seq_len

    @property
    def total_tokens(self) -> int:
        """Return the number of tokens that one pass over the text needs, those of the warm start included."""
        return self.num_steps * self.step_tokens + self.warm_start_tokens

    @property
    def held_back_tokens(self) -> int:
        """Return the number of tokens to hold back for the guard, as far as the text allows."""
        return min(self.guard_tokens, self.total_tokens // HELD_BACK) if self.num_steps else 0

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 - (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainingConfig:
        """Make a configuration of settings by name; the others keep their defaults.

        Raises:
            InvalidValueError: for an unknown setting; names the known ones.
        """
        known = sorted(each.name for each in fields(cls))
        if unknown := sorted(set(settings) - set(known)):
            raise InvalidValueError(f"Unknown setting {', '.join(unknown)}. Known settings: {', '.join(known)}.")
        return cls(**settings)


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value has the type of a setting. Numbers of NumPy are numbers; True is none."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(each, int) for each in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # _check_fields names the choices
    if kind in (int, float):
        numbers = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def in_words(kind: Any) -> str:
    """Return the type of a setting in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(in_words(each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"}[kind]


@cache
def setting_types() -> dict[str, Any]:
    """Return the type of every setting, by name."""
    return get_type_hints(TrainingConfig)


def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the choices of a Literal type, or of the one in a union; () for another type."""
    if get_origin(kind) in (Union, UnionType):
        return sum(map(choices_of, get_args(kind)), ())
    return get_args(kind) if get_origin(kind) is Literal else ()


def help_of(name: str) -> str:
    """Return the help of a setting, the meaning of None included."""
    about = TrainingConfig.__dataclass_fields__[name].metadata
    return f"{about['help']} None = {about['unset']}." if about["unset"] else str(about["help"])


TrainingConfig.__doc__ = f"{TrainingConfig.__doc__}\n    Attributes:\n" + "".join(
    f"        {each.name}: {help_of(each.name)}\n" for each in fields(TrainingConfig)
)


def __getattr__(name: str) -> Any:
    """Find the recipes, which have moved to a module of their own."""
    if name not in ("RECIPES", "recipe"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import warnings

    new = "metalens.training.recipes"
    warnings.warn(f"{__name__}.{name} has moved to {new}; the old name will be removed in the next release.", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(new), name)
