"""The result of a run: is it a lens, and what does it remember of the run?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.lenses.provenance import provenance_of
from metalens.lenses.translators import parameters_of
from metalens.models.language_model import LanguageModel
from metalens.training.settle import Settled
from metalens.utils.errors import InvalidValueError


class TrainingDivergedError(InvalidValueError):
    """A run gave no lens: every step was skipped, or the lens is not finite."""


def require_result(lens: TunedLens, skipped: int, steps: int) -> None:
    """Check that a run has trained a lens (TrainingDivergedError)."""
    remedy = (
        "Nothing is written, and an older lens stays as it was. Lower the learning rate. "
        "If the model is float16, its activations may overflow: convert it to bfloat16 (mlx_lm.convert --dtype bfloat16)."
    )
    if steps and skipped >= steps:
        raise TrainingDivergedError(f"The training has failed: the loss or the gradient of all {steps} steps was not finite. {remedy}")
    spoiled = [layer for layer in lens.translated if not all(map(_is_finite, parameters_of(lens.translator_of(layer)).values()))]
    if spoiled:
        raise TrainingDivergedError(f"The training has diverged: the translators of layers {spoiled} hold NaN or infinity. {remedy}")


def _is_finite(array: mx.array) -> bool:
    return bool(mx.all(mx.isfinite(array)).item())


def remember(
    lens: TunedLens, model: LanguageModel, settled: Settled, tokens: int | None, skipped: int, start: Mapping[str, Any] | None = None
) -> None:
    """Write into a lens what it was trained with.

    Args:
        lens: the lens.
        model: the model.
        settled: recipe, settings and text.
        tokens: number of tokens that each layer has seen in this run.
        skipped: number of steps that were skipped.
        start: facts of the lens that the run started from, or None.
    """
    training = {**settled.config.to_dict(), "data": settled.corpus.identity()}
    if math.isinf(settled.config.gradient_clip):
        training["gradient_clip"] = "inf"  # JSON has no infinity
    if skipped:
        training["skipped_steps"] = skipped
    if start is not None:
        training["start_from"] = dict(start)
    facts: dict[str, Any] = {"weights": model.weights_hash, "tokens": tokens, "recipe": settled.recipe, "training": training}
    lens.provenance = {**lens.provenance, **provenance_of(model.unembed, model.name, **facts)}
