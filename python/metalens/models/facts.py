"""What a model's configuration and the headers of its files say of it. No weights are read."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalens.models.context import context_in
from metalens.ops.metal.cost import weight_bytes
from metalens.utils.errors import InvalidValueError
from metalens.utils.renamed import renamed_attribute

# Last part of a module's name, for embeddings and heads. Every other matrix belongs to a block.
OUTSIDE_BLOCKS = (
    *("embed_tokens", "tok_embeddings", "wte", "embed_in", "embeddings", "word_embeddings", "token_embeddings", "embedding", "embed"),
    *("lm_head", "embed_out", "output", "head"),
)

# Last part of the name of a matrix of a block that every process has whole in mlx-lm's tensor parallelism: routers, and the first, narrow half of
# low-rank queries, keys and values.
UNDIVIDED = ("gate", "router", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa")

HEAD_NAMES = 4  # the number of names of heads, which stand at the end

# Bytes of a tokenizer's file for each entry of the vocabulary: 71 in SmolLM2's tokenizer.json, 127 in Gemma 3's.
ENTRY_BYTES = 80

# Bytes of the scale and the bias of one group of a quantized matrix: 16 bits each.
GROUP_BYTES = 4


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes of a model that decide what its lens costs.

    Attributes:
        num_layers: number of blocks, L.
        hidden_size: width of the residual stream, D.
        vocab_size: number of rows of the head, V.
        bits: bits of a number in the head. 16 = not quantized.
        group_size: numbers of the head that share a scale. 0 = not quantized.
        block_params: parameters of the blocks that one token is multiplied with.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    bits: int
    group_size: int
    block_params: int

    layers = renamed_attribute("layers", "num_layers")
    depth = renamed_attribute("depth", "hidden_size")
    vocab = renamed_attribute("vocab", "vocab_size")
    body = renamed_attribute("body", "block_params")

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the head, with a 16-bit scale and bias for each group."""
        return weight_bytes(self.vocab_size, self.hidden_size, self.bits, self.group_size, GROUP_BYTES)


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that decide what a training run takes.

    Attributes:
        dimensions: sizes of the model.
        weight_bytes: bytes of all weights.
        exact: whether `weight_bytes` was read from the model's files. False = estimated from the configuration.
        intermediate_size: width of the feed-forward layers that a token goes through.
        activation_bytes: bytes of a number in the residual stream.
        context_length: tokens that the model was made for. None = the configuration does not say.
        tokenizer_bytes: bytes of the tokenizer's file, or an estimate from the vocabulary.
        block_bits, block_group_size: bits and group size of most matrices of the blocks. 0 = as the head.
        undivided_bytes: bytes of the weights that every process has whole if the model is divided: embedding, head, norms, routers.
    """

    dimensions: ModelDimensions
    weight_bytes: int
    exact: bool
    intermediate_size: int
    activation_bytes: int
    context_length: int | None
    tokenizer_bytes: int = 0
    block_bits: int = 0
    block_group_size: int = 0
    undivided_bytes: int = 0

    weights = renamed_attribute("weights", "weight_bytes")
    intermediate = renamed_attribute("intermediate", "intermediate_size")
    context = renamed_attribute("context", "context_length")

    def of_process(self, processes: int) -> ModelFacts:
        """Return the facts of the part that one of several processes has of a divided model. Its blocks are as wide, and have a part of the work."""
        return replace(
            self,
            dimensions=replace(self.dimensions, block_params=-(-self.dimensions.block_params // processes)),
            weight_bytes=self.undivided_bytes + -(-(self.weight_bytes - self.undivided_bytes) // processes),
            intermediate_size=-(-self.intermediate_size // processes),
        )


def block_parameters(layers: int, hidden_size: int, intermediate_size: int, key_value_size: int) -> int:
    """Return the parameters of Llama's blocks: queries and outputs [D, D], keys and values [D, KV], three feed-forward matrices [D, I]."""
    return layers * hidden_size * (2 * hidden_size + 2 * key_value_size + 3 * intermediate_size)


def _llama(layers: int, hidden_size: int, intermediate_size: int, key_value_size: int, vocab_size: int = 128256) -> ModelDimensions:
    return ModelDimensions(layers, hidden_size, vocab_size, 4, 64, block_parameters(layers, hidden_size, intermediate_size, key_value_size))


# Models that an estimate knows by name, without any file.
KNOWN_MODELS = {
    "Llama-3.2-1B-4bit": _llama(16, 2048, 8192, 512),
    "Llama-3.1-8B-4bit": _llama(32, 4096, 14336, 1024),
    "Llama-3.1-70B-4bit": _llama(80, 8192, 28672, 1024),
}


def facts_of(model: str) -> ModelFacts:
    """Read the facts of a model. No weights are read.

    Args:
        model: a folder with a config.json, a hub id (only its small files are downloaded), or a name in `KNOWN_MODELS`.

    Raises:
        InvalidValueError: if it is none of these, or if a file is damaged or lacks a number that is needed.
    """
    if model in KNOWN_MODELS:
        d = KNOWN_MODELS[model]
        undivided = estimated_undivided_bytes(d, tied=False)
        tokenizer = ENTRY_BYTES * d.vocab_size
        return ModelFacts(d, estimated_weight_bytes(d, tied=False), False, 4 * d.hidden_size, 2, None, tokenizer, undivided_bytes=undivided)
    folder = Path(model)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        folder = _downloaded(model)
    config = _read_config(folder, model)
    try:
        return _facts(folder, config, _read_headers(folder))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(f"{folder / 'config.json'} holds a setting that is not a whole number above 0 ({error}). Copy it again.") from error


def facts_of_model(model: Any) -> ModelFacts:
    """Return the facts of a LanguageModel: those of its folder, or counted from its weights where it has none."""
    try:
        return facts_of(str(model.name))
    except (InvalidValueError, OSError):
        pass
    matrices = [module for layer in model.source.layers for module in layer.modules() if "weight" in module and module["weight"].ndim >= 2]
    params = sum(m["scales"].size * m.group_size if "scales" in m else m["weight"].size for m in matrices)
    head, hidden_size, vocab_size = model.unembed.head.weight, model.unembed.hidden_dim, model.unembed.vocab_size
    bits, group_size = (16, 0) if head.scales is None else (head.bits, head.group_size)
    dimensions = ModelDimensions(len(model.source), hidden_size, vocab_size, bits, group_size, params)
    weight_bytes = params * bits // 8 + 2 * dimensions.head_bytes
    width = max((m["weight"].shape[0] for m in matrices), default=4 * hidden_size)
    return ModelFacts(dimensions, weight_bytes, False, width, 2, None, ENTRY_BYTES * vocab_size)


def dimensions_of(model: str) -> ModelDimensions:
    """Read the dimensions of a model: see `facts_of`."""
    return facts_of(model).dimensions


def estimated_weight_bytes(d: ModelDimensions, tied: bool) -> int:
    """Estimate the bytes of a model whose every matrix has the head's format; `tied`: the head is the embedding too."""
    block_bytes = d.block_params * d.bits // 8 + (d.block_params // d.group_size * GROUP_BYTES if d.group_size else 0)
    return block_bytes + estimated_undivided_bytes(d, tied)


def estimated_undivided_bytes(d: ModelDimensions, tied: bool) -> int:
    """Estimate the bytes of the head and the embedding: see `estimated_weight_bytes`."""
    return d.head_bytes * (1 if tied else 2)


# ------------------------------------------------------------------ the configuration

Config = dict[str, Any]

# Names that GPT-2's kind of configuration gives to a setting.
OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner",),
}


def _read_config(folder: Path, model: str) -> Config:
    """Read config.json. The settings of its text model, if it has one, replace the others."""
    path = folder / "config.json"
    if not path.exists():
        raise InvalidValueError(
            f"{model!r} is no folder with a config.json and none of {', '.join(KNOWN_MODELS)}. "
            "Give a model's folder, a GGUF file, a hub id, one of these names, 'demo', 'smollm2' or 'gemma3-270m'."
        )
    config = _read_json(path)
    text_config = config.get("text_config")
    found = {**config, **text_config} if isinstance(text_config, dict) else config
    others = {name: next((found[other] for other in names if found.get(other)), None) for name, names in OTHER_NAMES.items() if name not in found}
    return {**found, **{name: value for name, value in others.items() if value is not None}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{path} is damaged: it is not valid JSON ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise InvalidValueError(f"{path} is damaged: it must hold a JSON object, not {type(found).__name__}. Copy it again.")
    return found


def _facts(folder: Path, config: Config, tensors: Tensors) -> ModelFacts:
    d = _dimensions(config, folder / "config.json")
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 1)
    active = int(config.get("num_experts_per_tok") or 1)
    per_expert = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or 4 * d.hidden_size)
    if tensors:
        d = replace(d, block_params=_multiplied_params(tensors, d.group_size, active / experts))
        total: int | None = sum(end - start for _, _, (start, end) in tensors.values())
    else:
        total = _indexed_bytes(folder)
    bits, group_size = d.bits, d.group_size
    d = replace(d, **_head_format(config, d))
    tokenizer = folder / "tokenizer.json"
    return ModelFacts(
        dimensions=d,
        weight_bytes=estimated_weight_bytes(d, bool(config.get("tie_word_embeddings"))) if total is None else total,
        exact=total is not None,
        intermediate_size=per_expert * (active if experts > 1 else 1),
        activation_bytes=4 if _activation_type(tensors, config) in ("F32", "float32") else 2,
        context_length=context_in(config),
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else ENTRY_BYTES * d.vocab_size,
        block_bits=bits,
        block_group_size=group_size,
        undivided_bytes=_undivided_bytes(tensors) if tensors else estimated_undivided_bytes(d, bool(config.get("tie_word_embeddings"))),
    )


def _head_format(config: Config, d: ModelDimensions) -> dict[str, int]:
    """Return the bits and the group size of the head, which may differ from those of the blocks."""
    names = OUTSIDE_BLOCKS[:-HEAD_NAMES] if config.get("tie_word_embeddings") else OUTSIDE_BLOCKS[-HEAD_NAMES:]
    for name, own in (config.get("quantization") or {}).items():
        if name.rpartition(".")[2] in names and isinstance(own, dict):
            return {"bits": int(own.get("bits", d.bits)), "group_size": int(own.get("group_size", d.group_size))}
    return {}


def _dimensions(config: Config, path: Path) -> ModelDimensions:
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    for name in needed:
        if name not in config:
            raise InvalidValueError(f"{path} does not say {name!r}: an estimate needs {', '.join(needed[:-1])} and {needed[-1]}.")
    layers, hidden_size, vocab_size = (int(config[name]) for name in needed)
    if min(layers, hidden_size, vocab_size) < 1:
        raise InvalidValueError(f"{path}: {', '.join(needed)} must be at least 1, got {layers}, {hidden_size}, {vocab_size}. Copy it again.")
    quantization = config.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise InvalidValueError(f"{path}: quantization must be an object with bits and group_size, got {quantization!r}. Copy it again.")
    heads = int(config.get("num_attention_heads", 1))
    key_value_size = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or hidden_size // heads)
    block_params = block_parameters(layers, hidden_size, int(config.get("intermediate_size", 4 * hidden_size)), key_value_size)
    return ModelDimensions(layers, hidden_size, vocab_size, int(quantization.get("bits", 16)), int(quantization.get("group_size", 0)), block_params)


def _activation_type(tensors: Tensors, config: Config) -> str:
    """Return the type of the residual stream: that of the norms' weights where headers are there, else the configuration's."""
    norms = [dtype for name, (dtype, shape, _) in tensors.items() if len(shape) == 1 and "norm" in name]
    return norms[0] if norms else str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")


# ------------------------------------------------------------------ the hub and the files of weights


def _downloaded(model: str) -> Path:
    """Download a hub model's config.json, and its index of weights if it has one. Return their folder."""
    from huggingface_hub import hf_hub_download  # slow to import

    try:
        folder = Path(hf_hub_download(model, "config.json")).parent
    except Exception as error:  # network, hub and cache each have error types of their own
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValueError(f"There is no folder {model}, and the hub's config.json of that name could not be downloaded: {reason}") from error
    try:
        hf_hub_download(model, "model.safetensors.index.json")
    except Exception:  # a model of one file has no index; its size is estimated
        return folder
    return folder


# {name of a tensor: (type, shape, (first byte, last byte + 1))}
Tensors = dict[str, tuple[str, list[int], tuple[int, int]]]


def _read_headers(folder: Path) -> Tensors:
    """Read the headers of all safetensors files of a folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, end = map(int, tensor["data_offsets"])
                    found[name] = (str(tensor["dtype"]), [int(n) for n in tensor["shape"]], (start, end))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, MemoryError, OverflowError, RecursionError) as error:
            raise InvalidValueError(f"{path} is damaged: its header can't be read ({error}). Copy it again.") from error
    return found


def _indexed_bytes(folder: Path) -> int | None:
    """Return the size of all weights as the index of a model of several files says it. None = it does not."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return None
    metadata = _read_json(path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int) and total > 0 else None


def _undivided_bytes(tensors: Tensors) -> int:
    """Return the bytes of the tensors that every process has whole if the model is divided. A bias, which is divided, counts as whole."""
    total = 0
    for name, (_, shape, (start, end)) in tensors.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if len(shape) < 2 or module in OUTSIDE_BLOCKS or module in UNDIVIDED:
            total += end - start
    return total


def _multiplied_params(tensors: Tensors, group_size: int, active: float) -> int:
    """Count the block parameters that one token is multiplied with.

    Args:
        tensors: headers of the model's files.
        group_size: numbers that share a scale, for matrices that are quantized.
        active: fraction of the experts that a token goes through. Experts are stacked in a third dimension.
    """
    total = 0.0
    for name, (_, shape, _) in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) < 2 or module.rpartition(".")[2] in OUTSIDE_BLOCKS:
            continue
        scales = tensors.get(f"{module}.scales")
        columns = scales[1][-1] * group_size if scales is not None and group_size else shape[-1]
        total += math.prod(shape[:-1]) * columns * (active if len(shape) == 3 else 1)
    return round(total)
