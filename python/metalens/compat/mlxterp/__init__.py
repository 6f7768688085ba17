"""The module names of mlxterp. Code written for mlxterp runs unchanged after these lines:

import sys, importlib
sys.modules["mlxterp"] = importlib.import_module("metalens.compat.mlxterp")
for name in ("tuned_lens", "core", "core.module_resolver"):
    sys.modules[f"mlxterp.{name}"] = importlib.import_module(f"metalens.compat.mlxterp.{name}")
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.compat.mlxterp.core.module_resolver import ModuleResolver
from metalens.lenses.lens import TunedLens
from metalens.model import InterpretableModel as _InterpretableModel
from metalens.model import train_tuned_lens
from metalens.training.data import Corpus
from metalens.utils.warn import warn_caller

__all__ = ["InterpretableModel", "TunedLens", "train_tuned_lens"]


class InterpretableModel(_InterpretableModel):
    """`metalens.InterpretableModel` with three habits of mlxterp that its users' code relies on.

    `_module_resolver` exists. Training texts are joined and tokenized as one text: if the tokenizer adds a BOS token,
    only the first sequence begins with it (`metalens.InterpretableModel` puts it before every sequence). Training data
    may hold ids beyond the vocabulary: mlxterp reads other memory for them, here they wrap around with a warning.
    """

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
