"""Documents for the viewer with chosen or random numbers, in the form that `Trajectory.to_json` writes, of any size and without a model."""

import base64

import numpy as np

from metalens.viewer.page import document

WORDS = ["the", " cat", " Paris", " is", " of", ",", "␣", "⏎", " capital", " France", "日本", " שלום", "<0xE6>", "<310>", "'s", " London"]


def packed(array, dtype="float32"):
    array = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
    return {"dtype": dtype, "shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def trajectory(layers=6, positions=5, k=4, lens="tuned lens", words=WORDS, seed=0, chosen=(2,), first=0, embedding=False):
    """Return a trajectory whose answers settle with the layers. Word i of the vocabulary has the id i."""
    rng = np.random.default_rng(seed)
    rows = layers + 1
    vocabulary = len(words)
    settle = np.linspace(0.1, 3.0, rows)[:, None, None]
    logits = rng.normal(size=(rows, positions, vocabulary)) + settle * 2 * rng.normal(size=(1, positions, vocabulary))
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)
    ranks = np.argsort(order, axis=-1) + 1
    top = np.take_along_axis(probabilities, order[..., :k], axis=-1)
    token_ids = rng.integers(0, vocabulary, positions)
    targets = np.append(token_ids[1:], -1)
    log_p = np.log(probabilities)
    kl = (probabilities[-1] * (log_p[-1] - log_p)).sum(-1)
    known = targets >= 0
    at_target = np.where(known, targets, 0)[None, :, None]
    rank = np.where(known, np.take_along_axis(ranks, np.broadcast_to(at_target, (rows, positions, 1)), -1)[..., 0], -1)
    nll = np.where(known, -np.take_along_axis(log_p, np.broadcast_to(at_target, (rows, positions, 1)), -1)[..., 0], np.nan)

    def statistic(label, unit, values, dtype="float32"):
        return {"label": label, "unit": unit, "values": packed(values[:-1], dtype), "model": packed(values[-1], dtype)}

    of = [*chosen]
    return {
        "format": "metalens.trajectory",
        "version": 2,
        "metalens": "0.1.0",
        "model": {"name": "test", "num_layers": layers, "vocab_size": vocabulary},
        "lens": {"name": lens, "path": None},
        "mask_input": False,
        "layers": [
            {"layer": "embedding", "label": "embedding", "translated": False}
            if embedding and not i
            else {"layer": i, "label": f"layer {i}", "translated": True}
            for i in range(layers)
        ],
        "first_position": first,
        "token_ids": [int(i) for i in token_ids],
        "target_ids": [int(i) for i in targets],
        "anti_target_ids": None,
        "vocabulary": {"ids": list(range(vocabulary)), "text": list(words), "display": list(words)},
        "statistics": {
            "entropy": statistic("entropy", "nats", -(probabilities * log_p).sum(-1)),
            "max_probability": statistic("probability of the top token", "", top[..., 0]),
            "kl": statistic("KL(model || lens)", "nats", kl),
            "cross_entropy": statistic("cross-entropy of the target", "nats", nll),
            "rank": statistic("rank of the target (1 = most likely)", "", rank, "int32"),
        },
        "top": {
            "ids": packed(order[:-1, :, :k], "uint32"),
            "log_probabilities": packed(np.log(top[:-1]), "float16"),
            "model": {"ids": packed(order[-1, :, :k], "uint32"), "log_probabilities": packed(np.log(top[-1]), "float16")},
        },
        "chosen": {
            "ids": of,
            "log_probabilities": packed(np.moveaxis(log_p[:-1][..., of], -1, 0)),
            "ranks": packed(np.moveaxis(ranks[:-1][..., of], -1, 0), "int32"),
            "model": {
                "log_probabilities": packed(np.moveaxis(log_p[-1][..., of], -1, 0)),
                "ranks": packed(np.moveaxis(ranks[-1][..., of], -1, 0), "int32"),
            },
        },
    }


def comparison(of, layers, positions, seed=1):
    values = np.random.default_rng(seed).random((layers, positions))
    names = {"kl": ("KL(a || b)", "nats"), "js": ("Jensen-Shannon divergence", "nats"), "tv": ("total variation", "")}
    statistics = {name: {"label": label, "unit": unit, "values": packed(values)} for name, (label, unit) in names.items()}
    return {"format": "metalens.comparison", "version": 2, "of": of, "statistics": statistics}


def layers_compared(layers=6, positions=5):
    """Return a document of one text through one lens, whose layers are compared with the next ones."""
    steps = comparison([[0, 0], [0, 0]], layers - 1, positions)
    return document([{"name": "A", "trajectories": [trajectory(layers, positions)]}], "a model", [steps], statistic="layers:js")


def two_lenses(layers=6, positions=5, **options):
    """Return a document of one text through two lenses."""
    trajectories = [trajectory(layers, positions, lens=lens, seed=seed, **options) for seed, lens in enumerate(("logit lens", "tuned lens"))]
    return document([{"name": "A", "trajectories": trajectories}], "a model", [comparison([[0, 1], [0, 0]], layers, positions)])
