"""Tiny configurations of mlx-lm's vision-language wrappers and of the text models they wrap."""

from typing import Any

from zoo.sizes import HEADS, SIZES

_SMALL: dict[str, Any] = {
    **SIZES,
    **HEADS,
    "tie_word_embeddings": False,
}

_MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}

_DEEPSEEK: dict[str, Any] = {
    **_SMALL,
    **_MLA,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}

_GEMMA3: dict[str, Any] = {
    **_SMALL,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
}

_GEMMA3N: dict[str, Any] = {
    **_SMALL,
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "intermediate_size": [96, 64, 96, 96],
    "num_kv_shared_layers": 2,
    # Smaller than the vocabulary, as in the released models: larger ids read row 0 of the per-layer table.
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 32,
    "sliding_window": 4,
    "rope_local_base_freq": 1000.0,
    "final_logit_softcapping": 5.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 32,
}

_GEMMA4: dict[str, Any] = {
    **_SMALL,
    "model_type": "gemma4_text",
    # Two kinds of attention, each once with its own and once with shared keys and values.
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
    "sliding_window": 4,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 131,
    "hidden_size_per_layer_input": 32,
    "final_logit_softcapping": 5.0,
}

_GEMMA4_MOE: dict[str, Any] = {
    **_GEMMA4,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "final_logit_softcapping": None,
}

_KIMI_LINEAR: dict[str, Any] = {
    **_SMALL,
    **_MLA,
    "model_type": "kimi_linear",
    "num_hidden_layers": 4,
    "model_max_length": 128,
    "linear_attn_config": {"kda_layers": [1, 2, 4], "full_attn_layers": [3], "num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 4},
    "mla_use_nope": True,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}

_KIMI_K3: dict[str, Any] = {
    **_KIMI_LINEAR,
    "activation_situ_beta": 2.0,
    "activation_situ_linear_beta": 3.0,
    "attn_res_block_size": 2,
    "mla_use_output_gate": True,
    "routed_expert_hidden_size": 32,
    "latent_moe_use_norm": True,
}

_LAGUNA: dict[str, Any] = {
    **_SMALL,
    "model_type": "laguna",
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "num_attention_heads_per_layer": [4, 2, 4],
    "partial_rotary_factor": 0.5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_routed_scaling_factor": 1.5,
    "moe_router_logit_softcapping": 2.0,
}

_MINIMAX_M3: dict[str, Any] = {
    **_SMALL,
    "model_type": "minimax_m3",
    "intermediate_size": 64,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_layer_freq": [0, 1, 1],
    "sparse_attention_config": {
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 16,
        "sparse_block_size": 2,
        "sparse_topk_blocks": 2,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1],
    },
}

_LLAMA: dict[str, Any] = {
    **_SMALL,
    "model_type": "llama",
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "attention_bias": True,
}

_YARN: dict[str, Any] = {
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_GLIMMER: dict[str, Any] = {
    **_SMALL,
    "model_type": "muse_glimmer",
    # The default pattern: three local blocks, then a global one.
    "num_hidden_layers": 4,
    "sliding_window": 4,
    "post_norm_eps": 1e-2,
    "final_logit_softcapping": 5.0,
    "output_multiplier": 0.25,
}

_QWEN3_5: dict[str, Any] = {
    **_SMALL,
    "model_type": "qwen3_5_text",
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

_QWEN3_5_MOE: dict[str, Any] = {
    **_QWEN3_5,
    "model_type": "qwen3_5_moe_text",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

_QWEN3_MOE: dict[str, Any] = {
    **_SMALL,
    "model_type": "qwen3_vl_moe_text",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
}

_TIED: dict[str, Any] = {"tie_word_embeddings": True}


def _prism(block: int, tied: bool) -> dict[str, Any]:
    """A Hadamard pack with packed embedding, head and MLPs; block 0 means no rotation."""
    # 512 is the smallest rotation the module knows, and it has to divide the packed input widths.
    text = {**_QWEN3_5, "hidden_size": 512, "intermediate_size": 512, "tie_word_embeddings": tied}
    paths = [f"model.layers.{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")]
    paths += ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    return {
        "model_type": "prism_hadamard_qwen35",
        "text_config": text,
        "schema_version": 2,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "gdn_activation_layout": "grouped",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": path, "embedding": "embed" in path, "dtype": "float16", "block": block} for path in paths],
    }


CONFIGS: dict[str, dict[str, Any]] = {
    # The wrapper's own vocab_size replaces that of the text_config (gemma4 too).
    "gemma3": {"model_type": "gemma3", "vocab_size": 131, "text_config": _GEMMA3},
    "gemma3n": {"model_type": "gemma3n", "text_config": _GEMMA3N},
    "gemma3n-nocap": {"model_type": "gemma3n", "text_config": {**_GEMMA3N, "final_logit_softcapping": None}},
    "gemma4": {"model_type": "gemma4", "vocab_size": 131, "text_config": _GEMMA4},
    "gemma4-tied": {"model_type": "gemma4", "vocab_size": 131, "text_config": {**_GEMMA4, **_TIED}},
    "gemma4-moe-nocap": {"model_type": "gemma4", "vocab_size": 131, "text_config": _GEMMA4_MOE},
    "gemma4_text": _GEMMA4,
    "gemma4_text-tied": {**_GEMMA4, **_TIED},
    "gemma4_text-moe-nocap": _GEMMA4_MOE,
    "kimi_k25": {"model_type": "kimi_k25", "text_config": {**_DEEPSEEK, "model_type": "deepseek_v3"}},
    "kimi_k3": {"model_type": "kimi_k3", "text_config": _KIMI_K3},
    "kimi_k3-tied": {"model_type": "kimi_k3", "text_config": {**_KIMI_K3, **_TIED}},
    "kimi_k3-plainres": {"model_type": "kimi_k3", "text_config": {**_KIMI_K3, "attn_res_block_size": None}},
    "kimi_vl": {"model_type": "kimi_vl", "text_config": {**_DEEPSEEK, "q_lora_rank": None}},
    "kimi_linear": _KIMI_LINEAR,
    "kimi_linear-tied": {**_KIMI_LINEAR, **_TIED},
    "laguna": _LAGUNA,
    "laguna-tied": {**_LAGUNA, **_TIED},
    "lfm2-vl": {
        "model_type": "lfm2-vl",
        "text_config": {
            **_SMALL,
            "model_type": "lfm2",
            "norm_eps": 1e-3,
            "conv_bias": True,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_ff_dim": 96,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": {
            **_SMALL,
            "model_type": "llama4_text",
            # The forward pass reads the cache of block 3.
            "num_hidden_layers": 4,
            "attention_bias": True,
            "attention_chunk_size": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size": 64,
            "intermediate_size_mlp": 96,
            # The module asserts top 1.
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "use_qk_norm": True,
            "floor_scale": 2,
        },
    },
    "minimax_m3_vl": {"model_type": "minimax_m3_vl", "text_config": _MINIMAX_M3},
    "minimax_m3_vl-tied": {"model_type": "minimax_m3_vl", "text_config": {**_MINIMAX_M3, **_TIED}},
    "minimax_m3_vl-plainnorm": {"model_type": "minimax_m3_vl", "text_config": {**_MINIMAX_M3, "use_gemma_norm": False}},
    "mistral3": {"model_type": "mistral3", "text_config": _LLAMA},
    "mistral3-tied": {"model_type": "mistral3", "text_config": {**_LLAMA, **_TIED}},
    "mistral3-ministral3": {"model_type": "mistral3", "text_config": {**_LLAMA, "model_type": "ministral3", "rope_parameters": _YARN}},
    "mistral3-mistral4": {
        "model_type": "mistral3",
        "text_config": {**_DEEPSEEK, "model_type": "mistral4", "rope_parameters": _YARN, "norm_topk_prob": True},
    },
    "muse_glimmer": _GLIMMER,
    "muse_glimmer-tied": {**_GLIMMER, **_TIED},
    "pixtral": {"model_type": "pixtral", "text_config": _LLAMA},
    "prism_hadamard_qwen35": _prism(512, tied=False),
    "prism_hadamard_qwen35-tied": _prism(512, tied=True),
    "prism_hadamard_qwen35-norotation": _prism(0, tied=False),
    "qwen2_vl": {"model_type": "qwen2_vl", "text_config": {**_SMALL, "model_type": "qwen2_vl_text"}},
    "qwen2_vl-tied": {"model_type": "qwen2_vl", "text_config": {**_SMALL, "model_type": "qwen2_vl_text", **_TIED}},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": _QWEN3_5},
    "qwen3_5-tied": {"model_type": "qwen3_5", "text_config": {**_QWEN3_5, **_TIED}},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe", "text_config": _QWEN3_5_MOE},
    "qwen3_5_moe-tied": {"model_type": "qwen3_5_moe", "text_config": {**_QWEN3_5_MOE, **_TIED}},
    "qwen3_vl": {"model_type": "qwen3_vl", "text_config": {**_SMALL, "model_type": "qwen3_vl_text"}},
    "qwen3_vl-tied": {"model_type": "qwen3_vl", "text_config": {**_SMALL, "model_type": "qwen3_vl_text", **_TIED}},
    "qwen3_vl_moe": {"model_type": "qwen3_vl_moe", "text_config": _QWEN3_MOE},
    "qwen3_vl_moe-tied": {"model_type": "qwen3_vl_moe", "text_config": {**_QWEN3_MOE, **_TIED}},
}
