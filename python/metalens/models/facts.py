"""What of a model decides about a training run, before it is loaded: from its configuration and the headers of its files."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalens.estimate.roofline import MODELS, Dimensions, dimensions
from metalens.utils.errors import InvalidValueError

# What embeddings and heads are called in files; matrices of other names belong to the blocks.
OUTSIDE_BLOCKS = (
    *("embed_tokens", "tok_embeddings", "wte", "embed_in", "embeddings", "word_embeddings", "token_embeddings", "embedding", "embed"),
    *("lm_head", "embed_out", "output", "head"),
)


@dataclass(frozen=True)
class ModelFacts:
    """What of a model decides about a run.

    Attributes:
        dimensions: layers, width, vocabulary, parameters of the blocks.
        weights: bytes.
        exact: whether they are those of its files, and not an estimate.
        intermediate: width of the feed-forward layers that a token goes through.
        activation_bytes: of a number in its residual stream.
        context: tokens that it was made for, if it says.
    """

    dimensions: Dimensions
    weights: int
    exact: bool
    intermediate: int
    activation_bytes: int
    context: int | None


def facts_of(model: str) -> ModelFacts:
    """Of a folder with a config.json, a hub id (its small files are fetched), or a name in `MODELS`. No weights are read.

    Raises:
        ValueError: if it is none of these, or the configuration does not say what is needed.
    """
    if model in MODELS:
        d = MODELS[model]
        return ModelFacts(d, estimated_weights(d, tied=False), False, 4 * d.depth, 2, None)
    folder = Path(model)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        folder = _fetched(model)
    d = dimensions(str(folder))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    experts, active = int(config.get("num_experts") or config.get("num_local_experts") or 1), int(config.get("num_experts_per_tok") or 1)
    per_expert = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or 4 * d.depth)
    tensors = _headers(folder)
    weights, exact = estimated_weights(d, bool(config.get("tie_word_embeddings"))), False
    index = folder / "model.safetensors.index.json"
    if tensors:
        weights, exact = sum(end - start for _, _, (start, end) in tensors.values()), True
        d = replace(d, body=_multiplied(tensors, d.group_size, active / experts))
    elif index.exists():
        total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
        weights, exact = (int(total), True) if total else (weights, False)
    return ModelFacts(
        d,
        weights,
        exact,
        per_expert * (active if experts > 1 else 1),
        4 if _stream_type(tensors, config) in ("F32", "float32") else 2,
        int(config["max_position_embeddings"]) if config.get("max_position_embeddings") else None,
    )


def estimated_weights(d: Dimensions, tied: bool) -> int:
    """Bytes of a model whose every matrix has the head's format."""
    body = d.body * d.bits // 8 + (d.body // d.group_size * 4 if d.group_size else 0)
    return body + d.head_bytes * (1 if tied else 2)


def _fetched(model: str) -> Path:
    from huggingface_hub import hf_hub_download  # slow to import

    try:
        folder = Path(hf_hub_download(model, "config.json")).parent
    except Exception as error:  # of the network, the hub, its cache: each has types of its own
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValueError(f"There is no folder {model}, and the hub's config.json of that name could not be had: {reason}") from error
    try:
        hf_hub_download(model, "model.safetensors.index.json")
    except Exception:  # models of a single file have none: the size is estimated
        return folder
    return folder


Tensors = dict[str, tuple[str, list[int], tuple[int, int]]]


def _headers(folder: Path) -> Tensors:
    """{name: (dtype, shape, (start, end))} of all tensors in a folder's safetensors files; a damaged file is left to those who load it."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            for name, about in header.items():
                if name != "__metadata__":
                    found[name] = (about["dtype"], about["shape"], tuple(about["data_offsets"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, MemoryError) as error:
            raise InvalidValueError(f"{path} is damaged: its header can't be read ({error}). Copy it again.") from error
    return found


def _multiplied(tensors: Tensors, group_size: int, active: float) -> int:
    """Parameters that a token is multiplied with in the blocks; of experts, stacked in a third dimension, the share that is active."""
    total = 0.0
    for name, (_, shape, _) in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(shape) < 2 or module.rpartition(".")[2] in OUTSIDE_BLOCKS:
            continue
        scales = tensors.get(f"{module}.scales")
        columns = scales[1][-1] * group_size if scales is not None and group_size else shape[-1]
        total += math.prod(shape[:-1]) * columns * (active if len(shape) == 3 else 1)
    return round(total)


def _stream_type(tensors: Tensors, config: dict[str, Any]) -> str:
    """Of the residual stream: that of the norms, where their headers can be read."""
    norms = [dtype for name, (dtype, shape, _) in tensors.items() if len(shape) == 1 and "norm" in name]
    return norms[0] if norms else str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
