"""Writes tuned_lens_v003.json beside it: small arrays, and what the functions of tuned-lens v0.0.3, which has the paper's analyses, make of them.

pip install torch==2.13.0 transformers tuned-lens==0.0.3
python tests/analysis/data/make_tuned_lens_v003.py
"""

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.distributions import MultivariateNormal
from tuned_lens.causal import extract_causal_bases, remove_subspace
from tuned_lens.nn import Decoder
from tuned_lens.residual_stream import ResidualStream
from tuned_lens.stats import (
    CalibrationError,
    LogitStats,
    ResidualStats,
    aitchison_similarity,
    effective_rank,
    gaussian_wasserstein_l2,
    gaussian_wasserstein_l2_origin,
    js_divergence,
    kl_divergence,
    spearmanr,
)

WIDTH, VOCAB, DIRECTIONS = 6, 9, 3


def tensor(array):
    """Return an array as a float64 tensor."""
    return torch.tensor(np.asarray(array, np.float64))


def listed(value):
    """Return a tensor or an array as lists whose numbers have ten digits."""
    value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, np.float64)
    return np.vectorize(lambda v: float(f"{v:.10g}"))(value).tolist()


def residual(x, parts):
    """Return mean, covariance and mean norm of vectors [N, D] that came in parts."""
    stats = ResidualStats()
    for part in np.split(x, parts):
        stats.update(ResidualStream(embeddings=tensor(part)))
    mean, covariance, norm = (each(dtype=torch.float64).embeddings for each in (stats.mean, stats.covariance, stats.mean_norm))
    return {"mean": listed(mean), "covariance": listed(covariance), "mean_norm": listed(norm)}


def causal(u, bias, h):
    """Return the basis that upstream finds for a decoder, and the energy of each of its vectors, computed by its own functions."""
    decoder = Decoder(d_model=WIDTH, vocab_size=VOCAB)
    decoder.unembedding.weight.data, decoder.unembedding.bias.data = tensor(u).float(), tensor(bias).float()
    (basis,) = list(extract_causal_bases(decoder, [tensor(h).float()] * 2, DIRECTIONS, mode="mean"))  # upstream's needs float32
    decoder, h = decoder.double(), tensor(h)
    energies = [kl_divergence(decoder(h), decoder(remove_subspace(h, v, mode="mean"))).mean() for v in basis.vectors.double().T]
    return {"vectors": listed(basis.vectors.T), "energies": listed(basis.energies), "energies_of_vectors": listed(torch.stack(energies))}


def inputs():
    """Return the arrays."""
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(WIDTH, WIDTH))
    return SimpleNamespace(
        x=rng.normal(size=(23, WIDTH)) @ factor + 1.5,
        y=0.6 * rng.normal(size=(20, WIDTH)) @ factor.T - 0.5,
        logits_p=2 * rng.normal(size=(5, VOCAB)),
        logits_q=2 * rng.normal(size=(5, VOCAB)),
        weights=rng.dirichlet(np.ones(VOCAB), size=5),
        basis=rng.normal(size=(2, WIDTH)),
        confidence=rng.uniform(0.3, 0.99, size=60),
        uniform=rng.uniform(size=60),
        ranks_a=rng.normal(size=12),
        ranks_b=rng.normal(size=12),
        ties=np.array([1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5]),
        unembedding=rng.normal(size=(VOCAB, WIDTH)),
        unembedding_bias=0.3 * rng.normal(size=VOCAB),
        hidden=rng.normal(size=(16, WIDTH)),
        singular=np.diag([3.0, 2.0, 1.0, 0.0]),
    )


def main():
    """Compute and write everything."""
    a = inputs()
    correct = a.uniform < a.confidence**2  # overconfident
    calibration = CalibrationError()
    calibration.update(torch.zeros(60, dtype=torch.int64), torch.stack([tensor(a.confidence), tensor(1 - a.confidence)], -1))
    calibration.hits, calibration.confidences = [torch.tensor(correct)], [tensor(a.confidence)]
    stats = LogitStats()
    for part in np.split(a.logits_p, [2]):
        stats.update(tensor(part))
    of_x, of_y = residual(a.x, [4, 5, 17]), residual(a.y, [10])
    gaussians = [MultivariateNormal(tensor(each["mean"]), tensor(each["covariance"])) for each in (of_x, of_y)]
    log_p, log_q, weights = tensor(a.logits_p).log_softmax(-1), tensor(a.logits_q).log_softmax(-1), tensor(a.weights)
    found = {
        "residual_x": of_x,
        "residual_y": of_y,
        "effective_rank": listed(effective_rank(tensor(of_x["covariance"]))),
        "effective_rank_of_singular": str(float(effective_rank(tensor(a.singular)))),
        "wasserstein": listed(gaussian_wasserstein_l2(*gaussians)),
        "wasserstein_to_origin": listed(gaussian_wasserstein_l2_origin(gaussians[0])),
        "aitchison_similarity": listed(aitchison_similarity(log_p, log_q, weight=weights)),
        "kl_divergence": listed(kl_divergence(tensor(a.logits_p), tensor(a.logits_q))),
        "js_divergence": listed(js_divergence(tensor(a.logits_p), tensor(a.logits_q))),
        "marginal_probs": listed(stats.marginal_probs),
        "sufficient_stats": listed(stats.sufficient_stats),
        "zero_ablation": listed(remove_subspace(tensor(a.x), tensor(a.basis.T), mode="zero")),
        "mean_ablation": listed(remove_subspace(tensor(a.x), tensor(a.basis.T), mode="mean")),
        "calibration": dict(zip(("ece", "bins"), calibration.compute(p=2), strict=True)),
        "spearman": listed(spearmanr(tensor(a.ranks_a), tensor(a.ranks_b))),
        "spearman_with_ties": listed(spearmanr(tensor(a.ties), tensor(a.ranks_b))),
        "spearman_of_itself": listed(spearmanr(tensor(a.ranks_a), tensor(a.ranks_a))),
        "causal": causal(a.unembedding, a.unembedding_bias, a.hidden),
    }
    given = {name: listed(array) for name, array in vars(a).items()} | {"correct": correct.tolist()}
    versions = {package: version(package) for package in ("tuned-lens", "torch")}
    file = Path(__file__).with_name("tuned_lens_v003.json")
    file.write_text(json.dumps({"versions": versions, "inputs": given, "results": found}, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
