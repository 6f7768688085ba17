"""Values that nearly all tiny configurations share."""

from typing import Any

# So large that another value changes the results visibly.
EPS = 1e-3

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "rms_norm_eps": EPS,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
