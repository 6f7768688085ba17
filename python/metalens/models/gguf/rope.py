"""How a GGUF file says that the rotary embedding is stretched, as mlx-lm's rope_scaling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from metalens.models.gguf.formats import dequantized
from metalens.models.gguf.header import GGUFFile
from metalens.utils.errors import InvalidValueError

# Llama 3's rule has four numbers. These are the same in all its models; the fourth, the factor, is the largest in the file's list.
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """Return mlx-lm's rope_scaling. None = the rotary embedding is not stretched.

    Raises:
        InvalidValueError: if the file stretches it in a way that mlx-lm does not have.
    """
    m = file.metadata
    context = m.setting("context_length", int)
    if {"rope_factors_long.weight", "rope_factors_short.weight"} <= set(file.tensors):
        return {
            "type": "longrope",
            "long_factor": _numbers(file, "rope_factors_long.weight"),
            "short_factor": _numbers(file, "rope_factors_short.weight"),
            "original_max_position_embeddings": m.setting("rope.scaling.original_context_length", int, context),
        }
    if "rope_freqs.weight" in file.tensors:
        return _listed(_numbers(file, "rope_freqs.weight"), m.setting("rope.freq_base", float, 10000.0), context)
    kind = m.setting("rope.scaling.type", str, "linear" if f"{m.architecture}.rope.scaling.factor" in m else "none")
    factor = m.setting("rope.scaling.factor", float, m.setting("rope.scale_linear", float, 1.0))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    if kind == "yarn" and m.architecture not in ("gemma", "gemma2", "phi3", "gptneox"):
        original = m.setting("rope.scaling.original_context_length", int, context)
        return {"type": "yarn", "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise InvalidValueError(f"{file.path} stretches its rotary embedding by {kind!r}, which mlx-lm does not have for {m.architecture}.")


def _numbers(file: GGUFFile, name: str) -> list[float]:
    return [float(x) for x in dequantized(file.tensors[name]).reshape(-1)]


def _listed(factors: list[float], base: float, context: int) -> dict[str, Any] | None:
    """Return the scaling for a list with one factor for each pair of rotated dimensions.

    It is Llama 3's rule if that gives the list, else the list itself.
    """
    largest = max(factors)
    if math.isclose(largest, 1.0) and math.isclose(min(factors), 1.0):
        return None
    if np.allclose(_llama3_factors(len(factors), base, largest), factors, rtol=1e-4):
        return {**LLAMA3, "factor": largest}
    # With the model's own context as the original one, mlx-lm multiplies nothing else.
    return {"type": "longrope", "rope_type": "longrope", "long_factor": factors, "short_factor": factors, "original_max_position_embeddings": context}


def _llama3_factors(pairs: int, base: float, factor: float) -> np.ndarray:
    """Return the factors of Llama 3's rule: 1 for short waves, `factor` for long ones, a smooth step between."""
    low, high, original = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], LLAMA3["original_max_position_embeddings"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert isinstance(original, int)
    turns = original / (2 * math.pi * base ** (np.arange(pairs) / pairs))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
