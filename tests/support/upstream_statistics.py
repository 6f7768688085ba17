"""The statistics of a trajectory three times: by metalens, in float64 NumPy, and by tuned-lens, on tiny models that both libraries load.

The weights are drawn from the raw bits of a generator, so that they are the same with every version of NumPy.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import save_file

from metalens import InterpretableModel, TunedLens
from metalens.compat import tuned_lens
from metalens.models.layers import layers_in_order
from metalens.readings import EMBEDDING, read_trajectory
from support import oracle

RECORDED = Path(__file__).parents[1] / "readings" / "data" / "upstream_statistics.json"
DIM, BLOCKS, VOCAB, EPS = 32, 3, 101, 1e-5
IDS = [7, 100, 3, 3, 58, 0, 91, 14, 62, 5, 77]
TARGETS = [*IDS[1:], 42]  # tuned-lens has a target at every position
ANTI_TARGETS = [9, 1, 100, 64, 2, 2, 33, 80, 0, 17, 5]
TOP, CHOSEN = 4, 58
# tuned-lens has no lens for the output of the last block.
LAYERS = [EMBEDDING, *range(BLOCKS - 1)]
LENSES = ("logit lens", "tuned lens")

_SHARED = {"hidden_size": DIM, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64}
CONFIGS = {
    "llama": {
        **_SHARED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": False,
    },
    # mlx-lm computes every NeoX model with this approximation of gelu; published Pythia models have the exact one.
    "gpt_neox": {
        **_SHARED,
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "intermediate_size": 4 * DIM,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": EPS,
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
}


class _Numbers:
    """Numbers from -1 to 1 that depend on the seed alone."""

    def __init__(self, seed):
        self.bits = np.random.PCG64(seed)

    def array(self, *shape, size=1.0, around=0.0):
        raw = self.bits.random_raw(int(np.prod(shape))).reshape(shape)
        return (around + size * ((raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1)).astype(np.float32)


def _llama_weights(n):
    wide = {"q_proj": (DIM, DIM), "k_proj": (DIM // 2, DIM), "v_proj": (DIM // 2, DIM), "o_proj": (DIM, DIM)}
    mlp = {"gate_proj": (48, DIM), "up_proj": (48, DIM), "down_proj": (DIM, 48)}
    weights = {"model.embed_tokens.weight": n.array(VOCAB, DIM)}
    for i in range(BLOCKS):
        for part, shapes in (("self_attn", wide), ("mlp", mlp)):
            weights |= {f"model.layers.{i}.{part}.{name}.weight": n.array(*shape, size=0.3) for name, shape in shapes.items()}
        weights |= {f"model.layers.{i}.{norm}.weight": n.array(DIM, size=0.3, around=1) for norm in ("input_layernorm", "post_attention_layernorm")}
    return weights | {"model.norm.weight": n.array(DIM, size=0.3, around=1), "lm_head.weight": n.array(VOCAB, DIM, size=0.7)}


def _neox_weights(n):
    linear = {"attention.query_key_value": (3 * DIM, DIM), "attention.dense": (DIM, DIM)}
    linear |= {"mlp.dense_h_to_4h": (4 * DIM, DIM), "mlp.dense_4h_to_h": (DIM, 4 * DIM)}

    def norm(name):
        return {f"{name}.weight": n.array(DIM, size=0.3, around=1), f"{name}.bias": n.array(DIM, size=0.2)}

    weights = {"gpt_neox.embed_in.weight": n.array(VOCAB, DIM)}
    for i in range(BLOCKS):
        for name, shape in linear.items():
            weights[f"gpt_neox.layers.{i}.{name}.weight"] = n.array(*shape, size=0.2)
            weights[f"gpt_neox.layers.{i}.{name}.bias"] = n.array(shape[0], size=0.1)
        weights |= norm(f"gpt_neox.layers.{i}.input_layernorm") | norm(f"gpt_neox.layers.{i}.post_attention_layernorm")
    return weights | norm("gpt_neox.final_layer_norm") | {"embed_out.weight": n.array(VOCAB, DIM, size=0.7)}


def save(folder, name):
    """Write the model of a name, and a lens for it in tuned-lens's files, into folder/model and folder/lens."""
    numbers = _Numbers([*CONFIGS].index(name))
    weights = {"llama": _llama_weights, "gpt_neox": _neox_weights}[name](numbers)
    (folder / "model").mkdir(parents=True)
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(CONFIGS[name]))
    lens = TunedLens(BLOCKS, DIM, embedding=True)
    for translator in [*[*lens.translators][:-1], lens.embedding_translator]:
        translator.weight = mx.eye(DIM) + mx.array(numbers.array(DIM, DIM, size=0.1))
        translator.bias = mx.array(numbers.array(DIM, size=0.3))
    tuned_lens.save(lens, folder / "lens", "tiny")


def of_metalens(folder):
    """Return {lens: {statistic: array}} and, under 'comparison', that of the tuned lens with the logit lens, as metalens computes them."""
    model = InterpretableModel(load_model(folder / "model")[0])
    options = {"targets": TARGETS, "anti_targets": ANTI_TARGETS, "tokens": [CHOSEN], "top_k": TOP, "embedding": True, "layers": range(BLOCKS - 1)}
    read = {name: read_trajectory(model, IDS, lens, **options) for name, lens in zip(LENSES, (None, tuned_lens.load(folder / "lens")), strict=True)}
    assert all([*t.layers] == LAYERS for t in read.values())
    found = {name: _arrays_of(t) for name, t in read.items()}
    return found | {"comparison": read["tuned lens"].compare(read["logit lens"]).to_numpy()}


def _arrays_of(t):
    both = [(t.statistics(), t.model.statistics())]
    arrays = {name: np.concatenate([values, own[name]]) for known, own in both for name, values in known.items()}
    for name in ("top_ids", "top_probabilities"):
        arrays[name] = np.concatenate([getattr(t, name), getattr(t.model, name)])
    for name in ("chosen_probabilities", "chosen_ranks"):
        arrays[name] = np.concatenate([getattr(t, name), getattr(t.model, name)], axis=1)[0]
    return arrays | {"prediction_depth": t.prediction_depth}


def of_numpy(folder):
    """Return the same from the hidden states that the model gives, in float64 NumPy from there on."""
    model = InterpretableModel(load_model(folder / "model")[0])
    states = model.source.capture(mx.array([IDS]), with_embedding=True)
    hidden = [oracle.wide(states.embedding[0]), *(oracle.wide(h[0]) for h in states.hidden)]
    lens, head, norm = tuned_lens.load(folder / "lens"), model.unembed.head, model.unembed.norm

    def logits(h):
        centered = h - h.mean(-1, keepdims=True) if norm.kind == "layer" else h
        n = oracle.rms_norm(centered, oracle.wide(norm.weight), norm.eps)
        return oracle.head_logits(n if norm.bias is None else n + oracle.wide(norm.bias), head)

    dense = map(lens.dense, layers_in_order(BLOCKS - 1))
    translated = [h @ oracle.wide(w).T + oracle.wide(b) for h, (w, b) in zip(hidden[:-1], dense, strict=True)]
    rows = {name: np.stack([logits(h) for h in [*of, hidden[-1]]]) for name, of in zip(LENSES, (hidden[:-1], translated), strict=True)}
    found = {name: of_log_probs(oracle.log_softmax(z)) for name, z in rows.items()}
    p, q = (oracle.log_softmax(rows[name][:-1]) for name in ("tuned lens", "logit lens"))
    return found | {"comparison": divergences(p, q)}


def of_log_probs(log_p):
    """Return the statistics of log-probabilities [R + 1, T, V], the model's last, as their definitions say."""
    p, own, at = np.exp(log_p), log_p[-1], np.arange(len(IDS))
    order = np.argsort(-log_p, axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1) + 1
    same = order[:-1, :, 0] == order[-1, :, 0]
    return {
        "entropy": -(p * log_p).sum(-1),
        "max_probability": p.max(-1),
        "kl": (np.exp(own) * (own - log_p)).sum(-1),
        "reverse_kl": (p * (log_p - own)).sum(-1),
        "cross_entropy": -log_p[:, at, TARGETS],
        "rank": ranks[:, at, TARGETS],
        "log_prob_difference": log_p[:, at, TARGETS] - log_p[:, at, ANTI_TARGETS],
        "agrees": order[..., 0] == order[-1, :, 0],
        "top_ids": order[..., :TOP],
        "top_probabilities": np.take_along_axis(p, order[..., :TOP], -1),
        "chosen_probabilities": p[..., CHOSEN],
        "chosen_ranks": ranks[..., CHOSEN],
        "prediction_depth": np.array([next((r for r in range(len(same) + 1) if same[r:, t].all()), -1) for t in at]),
    }


def divergences(log_p, log_q):
    """Return KL both ways, Jensen-Shannon and total variation of log-probabilities [R, T, V]."""
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    return {
        "kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "js": ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
        "tv": np.abs(p - q).sum(-1) / 2,
    }


# {statistic: what computes it in tuned-lens}. "log_probs": tuned-lens has no method; its log-probabilities give it.
UPSTREAM = {
    "entropy": "entropy()",
    "max_probability": "max_probability()",
    "kl": "forward_kl()",
    "reverse_kl": "kl_divergence(model)",
    "cross_entropy": "cross_entropy()",
    "rank": "rank()",
    "log_prob_difference": "log_prob_diff()",
    "agrees": "log_probs",
    "top_ids": "log_probs",
    "top_probabilities": "probs",
    "chosen_probabilities": "probs",
    "chosen_ranks": "rank()",
    "prediction_depth": "log_probs",
}
UPSTREAM_COMPARISON = {
    "kl": "kl_divergence(other)",
    "reverse_kl": "other.kl_divergence(self)",
    "js": "stats.js_divergence",
    "tv": "probs",
}


def of_tuned_lens(folder):
    """Return the same as tuned-lens and transformers compute it. They must be installed."""
    import torch
    from transformers import AutoModelForCausalLM
    from tuned_lens.nn.lenses import LogitLens
    from tuned_lens.nn.lenses import TunedLens as Theirs
    from tuned_lens.plotting import PredictionTrajectory
    from tuned_lens.stats import js_divergence

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    lenses = LogitLens.from_model(model), Theirs.from_model_and_pretrained(model, str(folder / "lens"))

    def trajectory(lens, targets, anti_targets=None):
        return PredictionTrajectory.from_lens_and_model(lens, model, IDS, targets=targets, anti_targets=anti_targets)

    read = {name: trajectory(lens, TARGETS, ANTI_TARGETS) for name, lens in zip(LENSES, lenses, strict=True)}
    found = {}
    for (name, t), lens in zip(read.items(), lenses, strict=True):
        plain = of_log_probs(t.log_probs)
        own = PredictionTrajectory(np.broadcast_to(t.log_probs[-1], t.log_probs.shape), t.input_ids)
        follow = trajectory(lens, [CHOSEN] * len(IDS))
        methods = {
            "entropy": t.entropy(),
            "max_probability": t.max_probability(),
            "kl": t.forward_kl(),
            "reverse_kl": t.kl_divergence(own),
            "cross_entropy": t.cross_entropy(),
            "rank": t.rank(),
            "log_prob_difference": t.log_prob_diff(),
            "chosen_ranks": follow.rank(),
        }
        found[name] = plain | {key: statistic.stats for key, statistic in methods.items()}
    a, b = read["tuned lens"], read["logit lens"]
    js = js_divergence(torch.tensor(a.log_probs), torch.tensor(b.log_probs)).numpy()
    pair = {"kl": a.kl_divergence(b).stats, "reverse_kl": b.kl_divergence(a).stats, "js": js, "tv": np.abs(a.probs - b.probs).sum(-1) / 2}
    return found | {"comparison": {name: values[:-1] for name, values in pair.items()}}


def error(found, expected):
    """Return the largest |found - expected| / max(1, |expected|)."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())
