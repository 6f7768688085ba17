"""The kinds of models that a GGUF file can hold: names of tensors, order of rows, and settings, in llama.cpp and in mlx-lm.

llama.cpp changes some tensors when it writes a file: it reorders the query and key rows of Llama (its rotary embedding pairs neighboring numbers),
splits the mixed query, key and value rows of GPT-NeoX, and adds 1 to the norms of Gemma. This module knows how to undo that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metalens.models.gguf.header import GGUFFile, Metadata
from metalens.models.gguf.rope import rope_scaling
from metalens.utils.errors import InvalidValueError

Config = dict[str, Any]

# Tensors that are settings, not weights: `rope_scaling` reads them.
ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        model_type: mlx-lm's name.
        classname: the name of the class in Transformers, for config.json.
        config: returns the settings for config.json.
        blocks: the path of the list of blocks in mlx-lm.
        names: {name in the file, without 'blk.<i>.' and without the suffix: path in mlx-lm, inside a block or in the model}.
        rows: returns the order of rows for a tensor. None = as in the file.
        norm_offset: a number to add to the norms of the file.
        wide: whether hidden states are too large for float16.
    """

    model_type: str
    classname: str
    config: Callable[[GGUFFile], Config]
    blocks: str
    names: Mapping[str, str]
    rows: Callable[[Metadata, str, int], np.ndarray | None] = field(default=lambda *_: None)
    norm_offset: float = 0.0
    wide: bool = False

    def path_of(self, name: str) -> str | None:
        """Return the path in mlx-lm of a tensor of the file. None = it is not a weight, or unknown."""
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            return None
        if block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            inner = self.names.get(block[2])
            return f"{self.blocks}.{block[1]}.{inner}.{suffix}" if inner and "." not in block[2] else None
        outer = self.names.get(f"/{stem}")
        return f"{outer}.{suffix}" if outer else None


def architecture_of(file: GGUFFile) -> Architecture:
    """Return the architecture of a file.

    Raises:
        InvalidValueError: if metalens can't convert it. The error names it, and lists the architectures that it can.
    """
    name = file.metadata.architecture
    found = ARCHITECTURES.get(name)
    if found is None:
        raise InvalidValueError(f"{file.path} has a model of the architecture {name!r}. metalens converts {', '.join(ARCHITECTURES)}.")
    if file.metadata.setting("expert_count", int, 0):
        raise InvalidValueError(f"{file.path} has a mixture of experts ({name}), which metalens does not convert. It converts dense models.")
    return found


# ------------------------------------------------------------------ settings


def _common(file: GGUFFile) -> Config:
    """Return the settings that every architecture with an RMS norm has."""
    m = file.metadata
    heads = m.setting("attention.head_count", int)
    config: Config = {
        "hidden_size": m.setting("embedding_length", int),
        "num_hidden_layers": m.setting("block_count", int),
        "intermediate_size": m.setting("feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": m.setting("attention.head_count_kv", int, heads),
        "rms_norm_eps": m.setting("attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": m.setting("context_length", int),
        "rope_theta": m.setting("rope.freq_base", float, 10000.0),
        "rope_traditional": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if scaling := rope_scaling(file):
        config["rope_scaling"] = scaling
    return config


def _head_dim(m: Metadata, rotary: bool = False) -> int:
    """Return the size of a head; `rotary`: files of this architecture may say it as the number of rotated dimensions."""
    heads = m.setting("attention.head_count", int)
    derived = m.setting("embedding_length", int) // heads if heads > 0 else 0
    size = m.setting("attention.key_length", int, m.setting("rope.dimension_count", int, derived) if rotary else derived)
    if derived < 1 or size < 1:
        raise InvalidValueError(f"{m.path} is damaged: it says {heads} attention heads of {size} numbers. Download it again.")
    return size


def _fraction(part: int, whole: int) -> float:
    """Return part / whole, rounded so that mlx-lm's int(whole * fraction) is `part` again."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, math.inf)


def _llama(file: GGUFFile) -> Config:
    config = {**_common(file), "head_dim": _head_dim(file.metadata, rotary=True)}
    biased = {name.split(".")[2] for name in file.tensors if name.startswith("blk.") and name.endswith(".bias")}
    return {
        **config,
        "attention_bias": bool(biased & {"attn_q", "attn_k", "attn_v", "attn_output"}),
        "mlp_bias": bool(biased & {"ffn_gate", "ffn_up", "ffn_down"}),
    }


def _qwen2(file: GGUFFile) -> Config:
    return _common(file)


def _qwen3(file: GGUFFile) -> Config:
    return {**_common(file), "head_dim": _head_dim(file.metadata)}


def _phi3(file: GGUFFile) -> Config:
    config, m = _common(file), file.metadata
    head_dim = _head_dim(m)
    return {
        **config,
        "partial_rotary_factor": _fraction(m.setting("rope.dimension_count", int, head_dim), head_dim),
        "original_max_position_embeddings": m.setting("rope.scaling.original_context_length", int, config["max_position_embeddings"]),
    }


def _gemma(file: GGUFFile) -> Config:
    return {**_common(file), "head_dim": _head_dim(file.metadata)}


def _query_scale(m: Metadata, largest_model: int) -> int:
    """Return the number whose inverse square root scales the queries. Transformers accepts whole numbers only.

    Files of llama.cpp do not say it: it is the size of a head, and D / heads in the largest model of the family, which has `largest_model` blocks.
    """
    key = f"{m.architecture}.attention.scale"
    if key in m and m.need(key, float) > 0:
        return round(m.need(key, float) ** -2)
    if m.setting("block_count", int) == largest_model:
        return m.setting("embedding_length", int) // m.setting("attention.head_count", int)
    return _head_dim(m)


def _gemma2(file: GGUFFile) -> Config:
    m = file.metadata
    return {
        **_gemma(file),
        "query_pre_attn_scalar": _query_scale(m, 46),
        "attn_logit_softcapping": m.setting("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": m.setting("final_logit_softcapping", float, 30.0),
        "sliding_window": m.setting("attention.sliding_window", int, 4096),
    }


def _gemma3(file: GGUFFile) -> Config:
    m = file.metadata
    config = _gemma(file)
    if f"{m.architecture}.rope.freq_base" not in m:
        config["rope_theta"] = 1_000_000.0
    pattern: Any = m.get(f"{m.architecture}.attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):  # one entry for each block, true for those with a window
        pattern = pattern.index(False) + 1 if False in pattern else len(pattern) + 1
    return {
        **config,
        "query_pre_attn_scalar": _query_scale(m, 62),
        "sliding_window": m.setting("attention.sliding_window", int, 512),
        "sliding_window_pattern": int(pattern),
        "rope_local_base_freq": m.setting("rope.freq_base_swa", float, 10000.0),
    }


def _gpt2(file: GGUFFile) -> Config:
    m = file.metadata
    config = {
        "n_embd": m.setting("embedding_length", int),
        "n_layer": m.setting("block_count", int),
        "n_head": m.setting("attention.head_count", int),
        "n_ctx": m.setting("context_length", int),
        "n_positions": m.setting("context_length", int),
        "layer_norm_epsilon": m.setting("attention.layer_norm_epsilon", float),
        "tie_word_embeddings": True,
    }
    # Other programs read the sizes under these names.
    aliases = {"hidden_size": config["n_embd"], "num_hidden_layers": config["n_layer"], "num_attention_heads": config["n_head"]}
    return {**config, **aliases, "max_position_embeddings": config["n_positions"]}


def _gptneox(file: GGUFFile) -> Config:
    m = file.metadata
    hidden, heads = m.setting("embedding_length", int), m.setting("attention.head_count", int)
    head_dim = _head_dim(m)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": m.setting("block_count", int),
        "num_attention_heads": heads,
        "intermediate_size": m.setting("feed_forward_length", int, 4 * hidden),
        "max_position_embeddings": m.setting("context_length", int),
        "layer_norm_eps": m.setting("attention.layer_norm_epsilon", float),
        "rotary_pct": _fraction(m.setting("rope.dimension_count", int, head_dim), head_dim),
        "rotary_emb_base": m.setting("rope.freq_base", float, 10000.0),
        "use_parallel_residual": m.setting("use_parallel_residual", bool, True),
        "tie_word_embeddings": False,
    }


# ------------------------------------------------------------------ order of rows


def _llama_rows(m: Metadata, name: str, rows: int) -> np.ndarray | None:
    """Return the order that turns pairs of neighbors into two halves of a head, for query and key rows."""
    match name.split(".")[-2]:
        case "attn_q":
            heads = m.setting("attention.head_count", int)
        case "attn_k":
            heads = m.setting("attention.head_count_kv", int, m.setting("attention.head_count", int))
        case _:
            return None
    if heads < 1 or rows % (2 * heads):
        raise InvalidValueError(f"{m.path} is damaged: {name} has {rows} rows for {heads} heads. Download it again.")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _gptneox_rows(m: Metadata, name: str, rows: int) -> np.ndarray | None:
    """Return the order that puts the query, key and value rows of each head together."""
    if name.split(".")[-2] != "attn_qkv":
        return None
    heads = m.setting("attention.head_count", int)
    if heads < 1 or rows % (3 * heads):
        raise InvalidValueError(f"{m.path} is damaged: {name} has {rows} rows for {heads} heads. Download it again.")
    return np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1).reshape(-1)


# ------------------------------------------------------------------ names

# A name with '/' before it is outside the blocks.
_OUTER = {"/token_embd": "model.embed_tokens", "/output_norm": "model.norm", "/output": "lm_head"}
_ATTENTION = {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj"}
_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_OUTER, **_ATTENTION, **_QKV, **_GATED, "ffn_norm": "post_attention_layernorm"}
_PHI3 = {
    **{**_OUTER, **_ATTENTION, "attn_qkv": "self_attn.qkv_proj"},
    **{"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm"},
}
_GEMMA2 = {
    **_LLAMA,
    **{"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
}
_GPT2 = {
    **{"/token_embd": "model.wte", "/position_embd": "model.wpe", "/output_norm": "model.ln_f"},
    **{"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"},
    **{"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
_GPTNEOX = {
    **{"/token_embd": "model.embed_in", "/output_norm": "model.final_layer_norm", "/output": "model.embed_out"},
    **{"attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"},
    **{"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
}

ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, "model.layers", _LLAMA, _llama_rows),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2, "model.layers", _LLAMA, wide=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3, "model.layers", {**_LLAMA, **_QK_NORMS}, wide=True),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _gemma, "model.layers", _LLAMA, norm_offset=-1.0, wide=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, "model.layers", _GEMMA2, norm_offset=-1.0, wide=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, "model.layers", {**_GEMMA2, **_QK_NORMS}, norm_offset=-1.0, wide=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _phi3, "model.layers", _PHI3, wide=True),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", _gpt2, "model.h", _GPT2),
    "gptneox": Architecture("gpt_neox", "GPTNeoXForCausalLM", _gptneox, "model.h", _GPTNEOX, _gptneox_rows),
}
