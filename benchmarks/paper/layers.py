"""Experiments on what the layers predict: perplexity, bias, the input token, and translators on other layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from benchmarks.paper.subjects import LENGTH, Subject

from metalens import LogitLens
from metalens.analysis import residual_statistics, similarity_matrix
from metalens.evaluation.marginals import LogitSums
from metalens.evaluation.marginals import bias as bias_of
from metalens.ops import lens_stats
from metalens.readings.rows import lens_rows


def perplexity(subject: Subject) -> dict[str, Any]:
    """Measure both lenses at every layer, sequence by sequence.

    Returns:
        {"model_ce": [S], "logit", "tuned": {"ce", "kl", "input": [S][L]}} for S sequences and L layers, in nats per token. "input" is the
        fraction of positions where the most likely token is the input token.
    """
    model, unembed = subject.model, subject.model.unembed
    layers = range(model.num_layers)
    lenses = {"logit": LogitLens(), "tuned": subject.lens}
    found: dict[str, Any] = {"model_ce": [], **{name: {"ce": [], "kl": [], "input": []} for name in lenses}}
    for ids in subject.sequences:
        hidden = [h[0] for h in model.source.capture(ids[None]).hidden]
        own, labels = unembed.norm(hidden[-1]), mx.concatenate([ids[1:], ids[:1]])
        found["model_ce"].append(_mean(lens_stats(own[None], unembed.head, 1, own, labels).nll, -1)[0])
        for name, lens in lenses.items():
            stats = lens_stats(lens_rows(hidden, layers, lens, unembed.norm), unembed.head, 1, own, labels)
            found[name]["ce"].append(_mean(stats.nll, -1))
            found[name]["kl"].append(_mean(stats.kl))
            found[name]["input"].append(_mean(stats.top_ids[:, :, 0] == ids[None]))
    return found


def _mean(values: mx.array | None, end: int | None = None) -> list[float]:
    """Return the mean over positions of values [L, T], without those after `end`."""
    return [round(float(value), 6) for value in np.array(values)[:, :end].mean(axis=1, dtype=np.float64)]


def bias(subject: Subject) -> dict[str, Any]:
    """Measure the KL of the mean predictions at every layer: {"logit", "tuned": [L]} in nats."""
    model, unembed = subject.model, subject.model.unembed
    layers = range(model.num_layers)
    lenses = {"logit": LogitLens(), "tuned": subject.lens}
    sums = {name: LogitSums(model.num_layers, unembed.head) for name in lenses}
    of_model = LogitSums(1, unembed.head)
    for ids in subject.sequences[: max(2, len(subject.sequences) // 2)]:
        hidden = [h[0] for h in model.source.capture(ids[None]).hidden]
        of_model.add(unembed.norm(hidden[-1])[None].astype(mx.float32))
        for name, lens in lenses.items():
            sums[name].add(lens_rows(hidden, layers, lens, unembed.norm))
    return {name: bias_of(of_model.means(), each.means()) for name, each in sums.items()}


def transfer(subject: Subject) -> dict[str, Any]:
    """Read layers with each other's translators, and compare the covariances of their hidden states.

    Returns:
        {"layers", "ce": [translator][layer] in nats, "similarity": [layer][layer] cosine of the covariances}.
    """
    model, unembed, lens = subject.model, subject.model.unembed, subject.lens
    layers = subject.chosen_layers(subject.budget.exchanged, last=False)
    nll, count = np.zeros((len(layers), len(layers))), 0
    for ids in subject.sequences:
        hidden = [h[0] for h in model.source.capture(ids[None]).hidden]
        labels = mx.concatenate([ids[1:], ids[:1]])
        for column, layer in enumerate(layers):
            rows = lens_rows([hidden[layer]] * model.num_layers, layers, lens, unembed.norm)
            nll[:, column] += np.array(lens_stats(rows, unembed.head, labels=labels).nll)[:, :-1].sum(axis=1, dtype=np.float64)
        count += ids.size - 1
    statistics = residual_statistics(model, subject.text, layers=layers, embedding=False, max_seq_len=LENGTH, max_tokens=subject.budget.held_out)
    return {"layers": layers, "ce": (nll / count).tolist(), "similarity": similarity_matrix(list(statistics.values())).tolist()}
