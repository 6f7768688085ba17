"""The result of an evaluation, as JSON and as files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metalens.evaluation.marginals import LogitStats, bias
from metalens.evaluation.scores import Scores
from metalens.evaluation.transfer import Transfer
from metalens.utils.files import atomic_write


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        tokens: positions read.
        bytes_per_token: of the text, for converting nats to bits per byte.
        model: the model's own scores (kl 0, top1 1).
        logit: the logit lens's, one per layer; layer i is the output of block i.
        tuned: the tuned lens's, or None without one.
        transfer: of the tuned lens, if it was asked for.
        logit_stats: {"model": of one layer, "logit": ..., "tuned": ... if there is one}, if they were asked for.
    """

    tokens: int
    bytes_per_token: float
    model: Scores
    logit: list[Scores]
    tuned: list[Scores] | None
    transfer: Transfer | None = None
    logit_stats: dict[str, LogitStats] | None = field(default=None, compare=False, repr=False)

    @property
    def nats_to_bpb(self) -> float:
        """Bits per byte for each nat per token: tokens / bytes / ln 2."""
        return 1 / (self.bytes_per_token * math.log(2))

    @property
    def bias(self) -> dict[str, list[float]] | None:
        """{"logit": [L], "tuned": [L] if there is one}: KL(marginal model || marginal lens) in nats per token; None without logit_stats."""
        if self.logit_stats is None:
            return None
        model = self.logit_stats["model"]
        return {name: bias(model, stats) for name, stats in self.logit_stats.items() if name != "model"}

    def to_dict(self) -> dict[str, Any]:
        """As JSON, nats per token where the names say nothing else.

        {"tokens", "bytes_per_token", "model": {...}, "layers": [{"layer", "logit": {...}, "tuned": {...}}, ...]}, where {...} are the fields of
        `Scores`; with logit_stats the lenses' also have "bias" and "bias_bits" (per token); with transfer there is also
        "transfer": {"ce", "kl", "kl_model"}, [translator][layer] each.
        """
        layers: list[dict[str, Any]] = [{"layer": i, "logit": asdict(scores)} for i, scores in enumerate(self.logit)]
        for entry, scores in zip(layers, self.tuned or [], strict=False):
            entry["tuned"] = asdict(scores)
        for name, values in (self.bias or {}).items():
            for entry, value in zip(layers, values, strict=True):
                entry[name] |= {"bias": value, "bias_bits": value / math.log(2)}
        result = {"tokens": self.tokens, "bytes_per_token": self.bytes_per_token, "model": asdict(self.model), "layers": layers}
        return result if self.transfer is None else result | {"transfer": asdict(self.transfer)}

    def to_upstream(self) -> dict[str, Any]:
        """What upstream's `tuned-lens eval` writes to aggregate_metrics.json: its names, its units and ITS numbering of layers.

        {"baseline": {"ce": {"final"}, "entropy": {"final"}}, "logit": {"ce": {"layer_1": ...}, "entropy": {...}, "kl": {...}}, "tuned": the same, and
        with transfer "layer_transfer": {"ce", "kl", "kl_model": {translator: {layer: ...}}}}, all in bits per byte.

        Upstream's layer i is the INPUT of block i. The output of block i, which is layer i everywhere else in metalens, is therefore "layer_<i + 1>"
        here: equal names mean equal hidden states. There is no "layer_0" (the embedding); the last layer (the model's own output) and "kl_model" are
        not in upstream's file, and the "layer_transfer" of the logit lens, whose translators are all the same, is only there.
        """
        ratio = self.nats_to_bpb

        def by_layer(values: list[float]) -> dict[str, float]:
            return {f"layer_{i + 1}": value for i, value in enumerate(values)}

        def of_lens(scores: list[Scores]) -> dict[str, Any]:
            return {
                "ce": by_layer([s.bits_per_byte for s in scores]),
                "entropy": by_layer([s.entropy_bits_per_byte for s in scores]),
                "kl": by_layer([s.kl_bits_per_byte for s in scores]),
            }

        own = {"ce": {"final": self.model.bits_per_byte}, "entropy": {"final": self.model.entropy_bits_per_byte}}
        result: dict[str, Any] = {"baseline": own, "logit": of_lens(self.logit)}
        if self.tuned is not None:
            result["tuned"] = of_lens(self.tuned)
        if self.transfer is not None:
            result["tuned"]["layer_transfer"] = {
                name: {f"layer_{i + 1}": by_layer([value * ratio for value in row]) for i, row in enumerate(matrix)}
                for name, matrix in asdict(self.transfer).items()
            }
        return result


def write_results(evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Write an evaluation into a folder, which is made if it is missing; each file appears whole or not at all.

    evaluation.json: `Evaluation.to_dict`.
    aggregate_metrics.json: `Evaluation.to_upstream`, in upstream's names, units and numbering of layers.
    logit_stats.npz, with logit_stats: n, and <name>_marginal_probs and <name>_sufficient_stats [L, tokens] for the names model (L = 1), logit and
        tuned; float32, layer i is the output of block i. (Upstream writes the marginals as JSON: for large vocabularies, hundreds of megabytes.)

    Returns:
        the files written.

    Raises:
        OSError: if one can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, data in (("evaluation.json", evaluation.to_dict()), ("aggregate_metrics.json", evaluation.to_upstream())):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
        written.append(folder / name)
    if evaluation.logit_stats is not None:
        arrays: dict[str, Any] = {"n": np.array(evaluation.tokens)}
        for name, stats in evaluation.logit_stats.items():
            arrays[f"{name}_marginal_probs"] = stats.marginal_probs.astype(np.float32)
            arrays[f"{name}_sufficient_stats"] = stats.sufficient_stats.astype(np.float32)
        with atomic_write(folder / "logit_stats.npz") as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)
        written.append(folder / "logit_stats.npz")
    return written
