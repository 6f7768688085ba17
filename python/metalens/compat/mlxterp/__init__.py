"""The module names of mlxterp. Code written for mlxterp runs unchanged after these lines:

import sys, importlib
sys.modules["mlxterp"] = importlib.import_module("metalens.compat.mlxterp")
for name in ("tuned_lens", "interventions", "core", "core.module_resolver"):
    sys.modules[f"mlxterp.{name}"] = importlib.import_module(f"metalens.compat.mlxterp.{name}")

What mlxterp has beside lenses, traces and interventions is not here: OUT_OF_SCOPE lists it, and its names raise an error that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.compat.mlxterp import interventions
from metalens.compat.mlxterp.activations import ActivationCache, batch_get_activations, collect_activations, get_activations
from metalens.compat.mlxterp.core.module_resolver import ModuleResolver
from metalens.compat.mlxterp.interventions import InterventionComposer, add_vector, clamp, noise, replace_with, scale, zero_out
from metalens.lenses.lens import TunedLens
from metalens.model import InterpretableModel as _InterpretableModel
from metalens.model import train_tuned_lens
from metalens.training.data import Corpus
from metalens.utils.errors import MetalensError
from metalens.utils.warn import warn_caller

__all__ = [
    "ActivationCache",
    "InterpretableModel",
    "InterventionComposer",
    "TunedLens",
    "add_vector",
    "batch_get_activations",
    "clamp",
    "collect_activations",
    "get_activations",
    "interventions",
    "noise",
    "replace_with",
    "scale",
    "train_tuned_lens",
    "zero_out",
]

# {name in mlxterp: what it is} that metalens does not have
OUT_OF_SCOPE = {
    **dict.fromkeys(("SAE", "SAEConfig", "SAETrainer", "sae"), "sparse autoencoders"),
    "visualization": "pictures of attention and the detection of kinds of heads",
}


class NotInMetalensError(MetalensError, ImportError):
    """A part of mlxterp that metalens does not have. An ImportError, so that `from mlxterp import SAE` shows its message."""


def __getattr__(name: str) -> Any:
    if name in OUT_OF_SCOPE:
        raise NotInMetalensError(f"metalens has no mlxterp.{name} ({OUT_OF_SCOPE[name]}): it is about lenses. Use mlxterp itself for it.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _OutOfScope:
    """A method of mlxterp's InterpretableModel that metalens does not have.

    Args:
        what: the kind of method.
        instead: what to do instead, in a sentence; "" = nothing here.
    """

    def __init__(self, what: str, instead: str = "") -> None:
        self._what, self._instead = what, instead

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(
            f"metalens has no {self._name} of mlxterp ({self._what}): it is about lenses. Use mlxterp itself for it. {self._instead}".strip()
        )


class InterpretableModel(_InterpretableModel):
    """`metalens.InterpretableModel` with three habits of mlxterp that its users' code relies on.

    `_module_resolver` exists. Training texts are joined and tokenized as one text: if the tokenizer adds a BOS token,
    only the first sequence begins with it (`metalens.InterpretableModel` puts it before every sequence). Training data
    may hold ids beyond the vocabulary: mlxterp reads other memory for them, here they wrap around with a warning.
    """

    activation_patching = _OutOfScope("activation patching", "One patch is trace(interventions={'layers.3.mlp': replace_with(value)}).")
    train_sae, load_sae = _OutOfScope("sparse autoencoders"), _OutOfScope("sparse autoencoders")
    get_top_features_for_text, get_top_texts_for_feature = _OutOfScope("sparse autoencoders"), _OutOfScope("sparse autoencoders")
    train_transcoder, train_crosscoder = _OutOfScope("transcoders"), _OutOfScope("crosscoders")

    @cached_property
    def _module_resolver(self) -> ModuleResolver:
        """Return the resolver of this model's modules."""
        return ModuleResolver(self.model, self.overrides.embedding, self.overrides.norm, self.overrides.head)

    def training_corpus(self, dataset: Sequence[Any]) -> Corpus:
        """Return `training_ids` as they are, without a prefix before every sequence."""
        return Corpus.from_ids(self.training_ids(dataset))

    def admit_training_ids(self, ids: np.ndarray) -> mx.array:
        """Return the ids as MLX's int32. Wrap ids outside the vocabulary around, with a warning."""
        if ids.size and (ids.min() < 0 or ids.max() >= self.embedding_rows):
            warn_caller(
                f"The tokenizer gives ids outside the model's vocabulary (0 to {self.embedding_rows - 1}); they are taken modulo its size. "
                "Is this the model's own tokenizer?"
            )
            ids = ids % self.embedding_rows
        return self.check_ids(ids)
