"""Write the models of mlx-lm as GGUF files, with the names, orders and norms of llama.cpp's converter."""

from __future__ import annotations

import re

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten, tree_unflatten

NAMES = {
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "embed_in": "token_embd",
    "wpe": "position_embd",
    "norm": "output_norm",
    "ln_f": "output_norm",
    "final_layer_norm": "output_norm",
    "lm_head": "output",
    "embed_out": "output",
    "input_layernorm": "attn_norm",
    "ln_1": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "attn.c_attn": "attn_qkv",
    "attention.query_key_value": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "attn.c_proj": "attn_output",
    "attention.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "ln_2": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_proj": "ffn_down",
    "mlp.dense_4h_to_h": "ffn_down",
}
GEMMA2_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def name_in_file(architecture, path):
    """Return the GGUF name of a parameter of mlx-lm's model."""
    stem, suffix = path.rsplit(".", 1)
    stem = re.sub(r"^(language_model\.)?(model\.)?", "", stem)
    names = NAMES | (GEMMA2_NAMES if architecture in ("gemma2", "gemma3") else {})
    if block := re.fullmatch(r"(?:layers|h)\.(\d+)\.(.+)", stem):
        return f"blk.{block[1]}.{names[block[2]]}.{suffix}"
    return f"{names[stem]}.{suffix}"


def as_in_file(architecture, config, name, array):
    """Apply what llama.cpp's converter does to a tensor."""
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if architecture == "llama" and re.search(r"attn_[qk]\.", name):
        heads = config["num_attention_heads"] if "attn_q" in name else config["num_key_value_heads"]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if architecture == "gptneox" and "attn_qkv" in name:
        heads = config["num_attention_heads"]
        split = array.reshape(heads, 3, array.shape[0] // heads // 3, *array.shape[1:])
        return np.concatenate([split[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])
    return array


def metadata_of(architecture, config):
    """Return the settings of a configuration of mlx-lm under llama.cpp's names, without the architecture."""
    c = config
    hidden, heads = c.get("hidden_size") or c["n_embd"], c.get("num_attention_heads") or c["n_head"]
    found = {
        "embedding_length": hidden,
        "block_count": c.get("num_hidden_layers") or c["n_layer"],
        "feed_forward_length": 4 * hidden if architecture in ("gpt2", "gptneox") else c["intermediate_size"],
        "context_length": c.get("max_position_embeddings") or c["n_ctx"],
        "attention.head_count": heads,
    }
    if architecture in ("gpt2", "gptneox"):
        found["attention.layer_norm_epsilon"] = float(c.get("layer_norm_eps") or c["layer_norm_epsilon"])
    else:
        found["attention.layer_norm_rms_epsilon"] = float(c["rms_norm_eps"])
        found["attention.head_count_kv"] = c["num_key_value_heads"]
    if architecture == "gptneox":
        found |= {"rope.dimension_count": int(c["rotary_pct"] * hidden / heads), "rope.freq_base": float(c["rotary_emb_base"])}
        found["use_parallel_residual"] = True
    elif architecture != "gpt2":
        found["rope.freq_base"] = float(c["rope_theta"])
    if architecture == "phi3":
        found["rope.dimension_count"] = int(c["partial_rotary_factor"] * hidden / heads)
    elif architecture == "llama":
        found["rope.dimension_count"] = c["head_dim"]
    elif architecture in ("qwen3", "gemma", "gemma2", "gemma3"):
        found["attention.key_length"] = c["head_dim"]
    if "query_pre_attn_scalar" in c:
        found["attention.scale"] = c["query_pre_attn_scalar"] ** -0.5
    if architecture == "gemma2":
        found |= {"attn_logit_softcapping": c["attn_logit_softcapping"], "final_logit_softcapping": c["final_logit_softcapping"]}
    if architecture == "gemma3":
        found |= {"attention.sliding_window": c["sliding_window"], "attention.sliding_window_pattern": c["sliding_window_pattern"]}
        found["rope.freq_base_swa"] = c["rope_local_base_freq"]
    return found


def tokenizer_metadata(tokenizer, pre):
    """Return the metadata of a byte-level BPE tokenizer of the `tokenizers` library."""
    import json

    described = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in described["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
    }


def write_gguf(path, architecture, metadata, tensors):
    """Write a GGUF file.

    Args:
        path: the file.
        architecture: llama.cpp's name.
        metadata: values by full key.
        tensors: {name: (array of float32, or bytes [rows, bytes of a row], kind)}.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path, architecture, config, model, kind=Kind.F32, extra=None, tokens=None):
    """Write a model of mlx-lm, its matrices in the given format, and give the model the numbers that the file now has."""
    tensors, held = {}, []
    for name, parameter in tree_flatten(model.parameters()):
        array = np.array(parameter.astype(mx.float32))
        matrix = array.ndim == 2
        chosen = kind if matrix else Kind.F32
        held.append((name, mx.array(gguf.quants.dequantize(gguf.quants.quantize(array, chosen), chosen)) if matrix else parameter))
        in_file = name_in_file(architecture, name)
        tensors[in_file] = (as_in_file(architecture, config, in_file, array), chosen)
    model.update(tree_unflatten(held))
    metadata = {f"{architecture}.{key}": value for key, value in metadata_of(architecture, config).items()}
    write_gguf(path, architecture, {**metadata, **(tokens or {}), **(extra or {})}, tensors)


def blocks(kind, rows, columns, rng):
    """Return random blocks [rows, bytes], whose float16 numbers are ordinary ones."""
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize((0.1 * rng.standard_normal((rows, columns))).astype(np.float32), kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // numbers, size), np.uint8)
    halves = {
        Kind.Q4_K: (0, 2),
        Kind.Q5_K: (0, 2),
        Kind.Q6_K: (208,),
        Kind.Q3_K: (108,),
        Kind.Q2_K: (80, 82),
    }[kind]
    for at in halves:
        raw[..., at : at + 2] = (0.01 * rng.random((rows, columns // numbers, 1))).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)
