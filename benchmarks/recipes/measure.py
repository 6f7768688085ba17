"""Train and score one case. `python -m benchmarks.recipes.measure CASE` does it in a process of its own, so that its memory can be measured."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from benchmarks.recipes.cases import LENGTH, MODELS, RECIPES, Case, texts

import metalens
from metalens import InterpretableModel, TunedLens
from metalens.evaluation.marginals import LogitSums, bias
from metalens.evaluation.scores import Sums
from metalens.evaluation.text import Sequences
from metalens.ops import lens_stats, normed
from metalens.readings.rows import lens_rows

NO_BYTES = 1.0  # the pages show nats per token only


def measured(case: Case) -> dict[str, Any]:
    """Train a lens and return its scores and its cost.

    Returns:
        {"case", "layers", "kl", "top1", "bias": [len(layers)]}, and for a run that trains {"config", "cpu_seconds", "seconds", "peak_bytes"}.
    """
    model_of = MODELS[case.model]
    training_text, held_out_text = texts(case.text)
    model = InterpretableModel(model_of.source)
    chosen = None if case.all_layers else model_of.layers(len(model.source))
    entry: dict[str, Any] = {"case": case.to_dict(), "layers": list(range(len(model.source)) if chosen is None else chosen)}
    if case.line == "logit lens":
        lens = TunedLens(len(model.source), model.unembed.hidden_dim)
    else:
        name, _ = RECIPES[case.line]
        # Scores are of blocks, so no recipe trains the embedding's translator, which would change the joint clip.
        settings = {"max_seq_len": LENGTH, "seed": case.seed, "tokens": case.tokens, "layers": chosen, "embedding": False, **case.settings}
        start, used = time.perf_counter(), time.process_time()
        lens = metalens.train(model, [training_text], recipe=name, **settings)
        entry |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        entry |= {"config": lens.provenance["training"], "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return entry | scores(model, lens, entry["layers"], held_out_text, model_of.held_out)


def scores(
    model: InterpretableModel, lens: TunedLens, layers: Sequence[int], text: str, tokens: int, marginals: bool = True
) -> dict[str, list[float]]:
    """Return what a lens does at some layers, by the full vocabulary.

    Returns:
        {"kl": KL(model || lens) in nats per token, "top1": share of tokens with the model's most likely one}, a number for each layer. With
        `marginals` also "bias", the KL of the mean predictions.
    """
    unembed = model.unembed
    sums, of_lens, of_model = Sums(len(layers)), LogitSums(len(layers), unembed.head), LogitSums(1, unembed.head)
    for ids in Sequences(model, text, LENGTH, tokens):
        hidden = [h[0] for h in model.source.capture(ids[None]).hidden]
        n_model = normed(hidden[-1].astype(mx.float32), unembed.norm)
        rows = lens_rows(hidden, layers, lens, unembed.norm)
        sums.add(lens_stats(rows, unembed.head, 1, n_model, mx.concatenate([ids[1:], ids[:1]])))
        if marginals:
            of_lens.add(rows)
            of_model.add(n_model[None])
    found = sums.scores(NO_BYTES)
    result = {"kl": [s.kl for s in found], "top1": [s.top1 for s in found]}
    return result | ({"bias": bias(of_model.means(), of_lens.means())} if marginals else {})


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measured(Case(**json.loads(sys.argv[1])))) + "\n")
