"""The length of the sequences that a model can read: the rows of its table of learned positions, and the length that it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.models.architectures import Settings, settings
from metalens.models.observing import replaced_methods, snapshot

# Names that configurations give to the number of tokens that a model was made for. The first one that is set counts.
CONTEXT_NAMES = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_seq_length", "seq_length"),
    *("model_max_length", "max_target_positions", "max_context_length", "context_length", "sequence_len"),
)


def context_in(config: Settings) -> int | None:
    """Return the tokens that a model was made for, as its configuration says. None = it does not say.

    The factor of a scaled rotary embedding (YaRN) counts.
    """
    found = next((int(config[name]) for name in CONTEXT_NAMES if config.get(name)), None)
    scaling = config.get("rope_scaling")
    if found is not None and isinstance(scaling, Mapping) and scaling.get("factor") and scaling.get("original_max_position_embeddings"):
        return max(found, int(float(scaling["factor"]) * int(scaling["original_max_position_embeddings"])))
    return found


def context_of(model: Any) -> int | None:
    """Return the tokens that a model was made for, as the configuration of the loaded model says: see `context_in`."""
    return next((found for values in settings(model) if (found := context_in(values)) is not None), None)


def learned_positions(model: nn.Module, blocks: Sequence[nn.Module]) -> int | None:
    """Return the number of positions that a model has learned vectors for. None = it has no such table (rotary models).

    A table is an embedding outside the blocks that the model calls with rising numbers when all token ids are equal. MLX does not compute this
    pass.
    """
    inside = {id(module) for block in blocks for _, module in block.named_modules()}
    tables = [m for _, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding)) and id(m) not in inside]
    if len(tables) < 2:
        return None
    calls: list[tuple[nn.Module, mx.array]] = []

    def recording(original: type) -> dict[str, Callable[..., Any]]:
        def call(table: nn.Module, ids: mx.array) -> Any:
            calls.append((table, snapshot(ids)))
            return original.__call__(table, ids)

        return {"__call__": call}

    with replaced_methods(tables, recording):
        model(mx.zeros((1, 2), mx.int32))
    limits = []
    for table, given in calls:
        numbers = np.array(given).reshape(-1)
        if numbers.size == 2 and numbers[1] == numbers[0] + 1:
            limits.append(int(table["weight"].shape[0] - numbers[0]))
    return min(limits, default=None)
