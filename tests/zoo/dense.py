"""Tiny random configurations of mlx-lm's dense decoders."""

from typing import Any

from zoo.sizes import EPS, HEADS, SIZES

_SMALL: dict[str, Any] = {
    **SIZES,
    **HEADS,
}
_GEMMA: dict[str, Any] = {**_SMALL, "hidden_size": 96}
_GPT: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 96,
    "n_ctx": 128,
    "n_positions": 128,
    "layer_norm_epsilon": EPS,
    "vocab_size": 131,
}
_MLA: dict[str, Any] = {**_SMALL, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}


def _both(name: str, tie: str = "tie_word_embeddings", base: dict[str, Any] = _SMALL, **extra: Any) -> dict[str, dict[str, Any]]:
    """Return two configurations: one with a separate head, and `<name>-tied` with the embedding as the head."""
    config = {"model_type": name, **base, **extra}
    return {name: {**config, tie: False}, f"{name}-tied": {**config, tie: True}}


CONFIGS: dict[str, dict[str, Any]] = {
    **_both("apertus", attention_bias=False, mlp_bias=False, post_norm=False, qk_norm=True),
    "cohere": {"model_type": "cohere", **_SMALL, "layer_norm_eps": EPS, "logit_scale": 0.25, "use_qk_norm": True},
    "cohere-norm-bias": {"model_type": "cohere", **_SMALL, "layer_norm_eps": EPS, "logit_scale": 0.25, "layer_norm_bias": True},
    "cohere2": {
        "model_type": "cohere2",
        **_SMALL,
        "layer_norm_eps": EPS,
        "logit_scale": 0.25,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "cohere2-norm-bias": {
        "model_type": "cohere2",
        **_SMALL,
        "layer_norm_eps": EPS,
        "layer_norm_bias": True,
        "logit_scale": 0.25,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    **_both("ernie4_5", use_bias=True),
    **_both("exaone", num_layers=3, layer_norm_epsilon=EPS, attention_bias=True, mlp_bias=True),
    **_both("exaone4", rope_scaling=None, sliding_window=4, sliding_window_pattern="LG"),
    "gemma": {"model_type": "gemma", **_GEMMA},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 20.0,
    },
    # Tied only by a checkpoint without an lm_head.weight (sanitize), not by the configuration.
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "query_pre_attn_scalar": 20.0,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 1000.0,
    },
    **_both("glm", attention_bias=True),
    "glm4": {"model_type": "glm4", **_SMALL, "attention_bias": True, "partial_rotary_factor": 0.5},
    "gpt2": {"model_type": "gpt2", **_GPT},
    **_both("gpt_bigcode", base=_GPT),
    "gpt_neox": {"model_type": "gpt_neox", **_SMALL, "num_key_value_heads": 4, "layer_norm_eps": EPS, "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": {"model_type": "gptj", **_GPT, "rotary_dim": 8},
    **_both(
        "granite",
        intermediate_size=128,  # its own quantization rule uses groups of 64
        attention_bias=True,
        mlp_bias=True,
        attention_multiplier=0.3,
        embedding_multiplier=6.0,
        residual_multiplier=0.4,
        logits_scaling=3.0,
    ),
    **_both("helium", attention_bias=True, mlp_bias=True),
    **_both("hunyuan_v1_dense", attention_bias=True, rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0}),
    **_both("internlm2", bias=True),
    **_both("internlm3", bias=True, qkv_bias=True),
    **_both("iquestloopcoder", loop_num=2, loop_window_size=4),
    # The module has no separate head.
    "lille-130m": {
        "model_type": "lille-130m",
        "block_size": 128,
        "layer_norm_eps": EPS,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 3,
        "rope_theta": 10000.0,
        "vocab_size": 131,
    },
    **_both("llama", attention_bias=True, mlp_bias=True, **_SLIDING),
    **_both("mimo"),
    **_both("minicpm", dim_model_base=16, scale_depth=1.4, scale_emb=6.0),
    # SuScaledRoPE reads the scaling without a default.
    **_both(
        "minicpm3",
        base=_MLA,
        dim_model_base=16,
        scale_depth=1.4,
        scale_emb=6.0,
        attention_bias=True,
        rope_scaling={"type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
    ),
    **_both(
        "ministral3",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4},
        **_SLIDING,
    ),
    **_both("nanbeige", attention_bias=True, mlp_bias=True),
    "nanbeige-loops": {"model_type": "nanbeige", **_SMALL, "tie_word_embeddings": False, "num_loops": 2},
    "nanbeige-loops-skip-norm": {"model_type": "nanbeige", **_SMALL, "tie_word_embeddings": False, "num_loops": 2, "skip_loop_final_norm": True},
    "nanochat": {"model_type": "nanochat", **_SMALL},
    **_both("nemotron", hidden_act="relu2", norm_eps=EPS, attention_bias=True, mlp_bias=True),
    **_both("olmo2", attention_bias=True, mlp_bias=True),
    **_both("olmo3", attention_bias=True, **_SLIDING),
    **_both(
        "openelm",
        tie="share_input_output_layers",
        base={"model_dim": 64, "num_transformer_layers": 3, "head_dim": 16, "vocab_size": 131, "rms_norm_eps": EPS},
        ffn_dim_divisor=32,
        num_query_heads=[4, 4, 2],
        num_kv_heads=[2, 2, 1],
        ffn_multipliers=[0.5, 1.0, 1.5],
    ),
    "phi": {"model_type": "phi", **_SMALL, "layer_norm_eps": EPS, "partial_rotary_factor": 0.5},
    **_both("phi3", partial_rotary_factor=0.5),
    # The module sets 91 fixed token ids up to 100351 to -inf, whatever the size of the vocabulary.
    "phi3small": {
        "model_type": "phi3small",
        **_SMALL,
        "vocab_size": 100353,
        "ff_intermediate_size": 96,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 2.0,
        "layer_norm_epsilon": EPS,
        "mup_attn_multiplier": 2.0,
        "mup_embedding_multiplier": 6.0,
        "mup_width_multiplier": 3.0,
    },
    "plamo": {"model_type": "plamo", **_SMALL, "n_shared_head": 2},
    **_both("plamo3", sliding_window=4, sliding_window_pattern=2, rope_local_theta=1000.0),
    "qwen": {"model_type": "qwen", **_SMALL, "kv_channels": 16, "layer_norm_epsilon": EPS, "intermediate_size": 192},
    "qwen-bias": {"model_type": "qwen", **_SMALL, "kv_channels": 16, "layer_norm_epsilon": EPS, "intermediate_size": 192, "no_bias": False},
    **_both("qwen2"),
    **_both("qwen3"),
    **_both("seed_oss", attention_bias=True, attention_out_bias=True, mlp_bias=True),
    **_both("smollm3", no_rope_layer_interval=2),
    **_both(
        "spark2_5",
        rope_parameters={
            "sliding_attention": {"rope_theta": 1000.0},
            "full_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        **_SLIDING,
    ),
    "stablelm": {
        "model_type": "stablelm",
        **_SMALL,
        "layer_norm_eps": EPS,
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": True,
        "qk_layernorm": True,
    },
    **_both("starcoder2", norm_epsilon=EPS),
    "talkie": {"model_type": "talkie", **_SMALL},
    **_both("telechat3", attention_bias=True, mlp_bias=True),
    **_both("youtu_llm", base=_MLA, v_head_dim=16, attention_bias=True, mlp_bias=True),
}
