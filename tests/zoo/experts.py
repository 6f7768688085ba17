"""Tiny random configurations of mlx-lm's mixture-of-experts decoders."""

from typing import Any

from zoo.sizes import EPS, HEADS, SIZES

_SMALL: dict[str, Any] = {
    **SIZES,
    **HEADS,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "attention_bias": False,
}
_LOCAL: dict[str, Any] = {**_SMALL, "num_local_experts": 4}
_ROUTED: dict[str, Any] = {
    **_SMALL,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_MLA: dict[str, Any] = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
# index_topk is smaller than a short prompt, so that the indexer leaves some keys out.
_INDEXER: dict[str, Any] = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 4}
_GLM: dict[str, Any] = {**_ROUTED, "rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": False}
_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
_SHARED: dict[str, Any] = {"num_shared_experts": 1}


def _both(name: str, base: dict[str, Any], **extra: Any) -> dict[str, dict[str, Any]]:
    """Return two configurations: one with a separate head, and `<name>-tied` with the embedding as the head."""
    config = {"model_type": name, **base, **extra}
    return {name: {**config, "tie_word_embeddings": False}, f"{name}-tied": {**config, "tie_word_embeddings": True}}


_BAILING: dict[str, Any] = {
    **_SMALL,
    **_SHARED,
    "first_k_dense_replace": 1,
    "use_bias": True,
    "use_qkv_bias": True,
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 1.5,
    "score_function": "sigmoid",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Klear": {"model_type": "Klear", **_SMALL, "mlp_only_layers": [0], "decoder_sparse_step": 1, "n_shared_experts": 1},
    **_both("afmoe", {**_SMALL, **_SHARED, **_SLIDING}, num_dense_layers=1, mup_enabled=True),
    **_both("bailing_moe", _BAILING),
    # The forward pass does not use the switch: with it, loading from a directory divides the head's columns by their norms.
    "bailing_moe-norm-head": {"model_type": "bailing_moe", **_BAILING, "norm_head": True},
    "dbrx": {
        "model_type": "dbrx",
        "vocab_size": 131,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": {"model_type": "deepseek", **_ROUTED},
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **_MLA,
        "topk_method": "greedy",
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **_MLA},
    "deepseek_v32": {"model_type": "deepseek_v32", **_MLA, **_INDEXER},
    **_both("dots1", _ROUTED),
    **_both("ernie4_5_moe", _SMALL, use_bias=True, moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1),
    **_both("exaone_moe", {**_SMALL, **_SHARED, **_SLIDING}, is_moe_layer=[False, True, True]),
    "glm4_moe": {"model_type": "glm4_moe", **_GLM},
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", **_MLA},
    "glm_moe_dsa": {"model_type": "glm_moe_dsa", **_MLA, **_INDEXER, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "gpt_oss": {"model_type": "gpt_oss", **_LOCAL, **_SLIDING, "intermediate_size": 32},
    **_both(
        "granitemoe",
        {**_LOCAL, "intermediate_size": 64},  # its own quantization rule uses groups of 64
        logits_scaling=3.0,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "hunyuan": {
        "model_type": "hunyuan",
        **_SMALL,
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
        "tie_word_embeddings": True,
    },
    **_both("llama4_text", _SMALL, intermediate_size_mlp=96, no_rope_layers=[1, 0, 1], use_qk_norm=True),
    **_both(
        "mellum",
        {**_SMALL, **_SLIDING},
        rope_parameters={"sliding_attention": {"rope_theta": 1000.0}, "full_attention": {"rope_theta": 10000.0}},
    ),
    "mimo_v2_flash": {
        "model_type": "mimo_v2_flash",
        **_ROUTED,
        "hybrid_layer_pattern": [1, 0, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 4,
        "layernorm_epsilon": EPS,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "v_head_dim": 16,
        "swa_head_dim": 32,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.7,
    },
    **_both(
        "mistral4",
        _MLA,
        rope_parameters={
            "type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    **_both("mixtral", {**_LOCAL, "intermediate_size": 32}),
    **_both("olmoe", {**_SMALL, "intermediate_size": 32}),
    "phimoe": {"model_type": "phimoe", **_LOCAL, "intermediate_size": 32, "router_jitter_noise": 0.05},
    "qwen2_moe": {"model_type": "qwen2_moe", **_SMALL, "shared_expert_intermediate_size": 64},
    **_both("qwen3_moe", _SMALL, mlp_only_layers=[0], decoder_sparse_step=1),
    "solar_open": {"model_type": "solar_open", **_GLM},
}
