"""The result of an evaluation: as an object, as JSON, and as files."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metalens.evaluation.marginals import LogitStats, bias
from metalens.evaluation.scores import Scores
from metalens.evaluation.sequences import SequenceScores
from metalens.evaluation.transfer import Transfer
from metalens.utils.files import atomic_write
from metalens.utils.outputs import Output, require_replaceable

# The most layers that the text form of an evaluation shows.
MOST_ROWS = 24


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        tokens: number of positions read.
        bytes_per_token: UTF-8 bytes of the text for each position.
        model: scores of the model's own predictions (kl 0, top1 1).
        logit: scores of the logit lens, one per layer; layer i is the output of block i.
        tuned: scores of the tuned lens, one per layer; None without a lens.
        transfer: layer transfer of the tuned lens; None if it was not asked for.
        logit_stats: mean predictions {"model": one layer, "logit": L layers, "tuned": L layers if there is a lens};
            None if not asked for.
        untranslated: layers of which the tuned lens has no translator. It reads them as the logit lens does, so tables, JSON
            and means of the tuned lens leave them out; `tuned` and `logit_stats` have them, to keep layer i at index i.
        embedding: scores of the embedding's output, {"logit", and "tuned" if there is a lens}; None if not asked for. No mean has them.
        sequences: values of every sequence, and the standard errors of the means; None if not known.
    """

    tokens: int
    bytes_per_token: float
    model: Scores
    logit: list[Scores]
    tuned: list[Scores] | None
    transfer: Transfer | None = None
    logit_stats: dict[str, LogitStats] | None = field(default=None, compare=False, repr=False)
    untranslated: tuple[int, ...] = ()
    embedding: dict[str, Scores] | None = None
    sequences: SequenceScores | None = field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        lenses = {"logit": self.logit} | ({} if self.tuned is None else {"tuned": self.tuned})
        lines = [
            f"Evaluation of {self.tokens} tokens: KL(model || lens) in nats per token, top-1 agreement with the model",
            f"{'layer':>6}" + "".join(f"  {name + ' KL':>9}  {'top-1':>6}" for name in lenses),
        ]
        rows = [f"{i:>6}" + "".join(self._cells(name, i) for name in lenses) for i in range(len(self.logit))]
        if len(rows) > MOST_ROWS:
            rows[MOST_ROWS // 2 : -MOST_ROWS // 2] = [f"{'...':>6}"]
        if self.embedding is not None:
            rows.insert(0, f"{'embed.':>6}" + "".join(_cells(self.embedding[name].kl, self.embedding[name].top1) for name in lenses))
        if rows:
            chosen = {name: [scores[i] for i in self.translated] for name, scores in lenses.items()}
            rows.append(f"{'mean':>6}" + "".join(_cells(_mean(s.kl for s in scores), _mean(s.top1 for s in scores)) for scores in chosen.values()))
        if self.untranslated:
            rows.append(f"The mean is over the {len(self.translated)} layers that the lens translates.")
        return "\n".join(lines + rows)

    def _cells(self, lens: str, layer: int) -> str:
        """Return the cells of a lens in the row of a layer."""
        if lens == "tuned" and layer in self.untranslated:
            return f"  {'-':>9}  {'-':>6}"
        scores = (self.tuned if lens == "tuned" and self.tuned is not None else self.logit)[layer]
        return _cells(scores.kl, scores.top1)

    @property
    def translated(self) -> list[int]:
        """Return the layers that the tuned lens translates; without one, and for lenses that are functions, all layers."""
        return [layer for layer in range(len(self.logit)) if layer not in self.untranslated]

    @property
    def nats_to_bpb(self) -> float:
        """Return the bits per byte for each nat per token: 1 / (bytes_per_token * ln 2)."""
        return 1 / (self.bytes_per_token * math.log(2))

    @property
    def bias(self) -> dict[str, list[float]] | None:
        """Return KL(marginal of the model || marginal of the lens) in nats per token; None without logit_stats.

        Returns:
            {"logit": [L], and "tuned": [L] if there is a lens}.
        """
        if self.logit_stats is None:
            return None
        model = self.logit_stats["model"]
        return {name: bias(model, stats) for name, stats in self.logit_stats.items() if name != "model"}

    def standard_errors(self, lens: str, score: str) -> list[float] | None:
        """Return the standard errors of the means of a lens, one for each layer, by the spread over sequences; None for fewer than two sequences.

        Args:
            lens: 'model' (one layer), 'logit' or 'tuned'; with the embedding also 'logit embedding' and 'tuned embedding' (one layer).
            score: 'kl', 'ce', 'entropy' (nats per token) or 'top1' (0 to 1).
        """
        found = None if self.sequences is None else self.sequences.standard_errors(lens, score)
        return None if found is None else [float(value) for value in found]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON holds it, in nats per token unless a name gives the unit.

        Returns:
            {"tokens", "bytes_per_token", "model": {...}, "layers": [{"layer", "logit": {...}, "tuned": {...}}, ...]},
            where {...} has the fields of `Scores`. A layer that the tuned lens does not translate has no "tuned". With
            logit_stats, "logit" and "tuned" also have "bias" and "bias_bits" (bits per token). With transfer there is
            also "transfer": {"ce", "kl", "kl_model"}, each [translator][layer]; with the embedding "embedding": {"logit", "tuned"}; and of
            two sequences or more "sequences", their number, and "standard_errors": {lens: {"kl": [L], "ce": [L]}}.
        """
        layers: list[dict[str, Any]] = [{"layer": i, "logit": asdict(scores)} for i, scores in enumerate(self.logit)]
        if self.tuned is not None:
            for layer in self.translated:
                layers[layer]["tuned"] = asdict(self.tuned[layer])
        for name, values in (self.bias or {}).items():
            for entry, value in zip(layers, values, strict=True):
                if name in entry:
                    entry[name] |= {"bias": value, "bias_bits": value / math.log(2)}
        result = {"tokens": self.tokens, "bytes_per_token": self.bytes_per_token, "model": asdict(self.model), "layers": layers}
        if self.embedding is not None:
            result["embedding"] = {name: asdict(scores) for name, scores in self.embedding.items()}
        if self.sequences is not None and len(self.sequences) > 1:
            result["sequences"] = len(self.sequences)
            result["standard_errors"] = {lens: {name: self.standard_errors(lens, name) for name in ("kl", "ce")} for lens in self.sequences.sums}
        return result if self.transfer is None else result | {"transfer": asdict(self.transfer)}

    def to_upstream(self) -> dict[str, Any]:
        """Return the contents of the aggregate_metrics.json of upstream's `tuned-lens eval`: its names, its units and ITS numbering of layers.

        Upstream's layer i is the INPUT of block i. So "layer_<i + 1>" here is the output of block i, which is layer i
        everywhere else in metalens: equal names mean equal hidden states. "layer_0", the embedding, is there if it was measured.
        "tuned" has only the layers that the lens translates.
        Upstream's file does not have the last layer (the model's own output) and "kl_model". Only upstream's file has a
        "layer_transfer" of the logit lens, whose translators are all the same.

        Returns:
            {"baseline": {"ce": {"final"}, "entropy": {"final"}}, "logit": {"ce": {"layer_1": ...}, "entropy": {...},
            "kl": {...}}, "tuned": the same}; with transfer "tuned" also has "layer_transfer": {"ce", "kl", "kl_model":
            {translator: {layer: ...}}}. All in bits per byte.
        """
        ratio = self.nats_to_bpb

        def by_layer(values: list[float], left_out: tuple[int, ...] = ()) -> dict[str, float]:
            return {f"layer_{i + 1}": value for i, value in enumerate(values) if i not in left_out}

        def of_lens(scores: list[Scores], left_out: tuple[int, ...] = ()) -> dict[str, Any]:
            return {
                "ce": by_layer([s.bits_per_byte for s in scores], left_out),
                "entropy": by_layer([s.entropy_bits_per_byte for s in scores], left_out),
                "kl": by_layer([s.kl_bits_per_byte for s in scores], left_out),
            }

        own = {"ce": {"final": self.model.bits_per_byte}, "entropy": {"final": self.model.entropy_bits_per_byte}}
        result: dict[str, Any] = {"baseline": own, "logit": of_lens(self.logit)}
        if self.tuned is not None:
            result["tuned"] = of_lens(self.tuned, self.untranslated)
        for name, scores in (self.embedding or {}).items():
            for score, value in (("ce", scores.bits_per_byte), ("entropy", scores.entropy_bits_per_byte), ("kl", scores.kl_bits_per_byte)):
                result[name][score] = {"layer_0": value} | result[name][score]
        if self.transfer is not None:
            result["tuned"]["layer_transfer"] = {
                name: {f"layer_{i + 1}": by_layer([v * ratio for v in row]) for i, row in enumerate(matrix) if i not in self.untranslated}
                for name, matrix in asdict(self.transfer).items()
            }
        return result


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _cells(kl: float, top1: float) -> str:
    return f"  {kl:z9.3f}  {100 * top1:5.1f}%"


LONGEST_LINE = 1 << 26  # bytes of batches.jsonl that are read to see whose it is
RESULTS = ("evaluation.json", "aggregate_metrics.json", "batches.jsonl", "logit_stats.npz")


def result_outputs(folder: str | Path) -> list[Output]:
    """Return the files that `write_results` may write."""
    folder = Path(folder).expanduser()
    evaluation, metrics, batches, stats = (folder / name for name in RESULTS)
    return [
        Output(evaluation, "an evaluation", lambda path: _has_keys(path, "tokens", "bytes_per_token", "layers")),
        Output(metrics, "the metrics of an evaluation", lambda path: _has_keys(path, "baseline", "logit")),
        Output(batches, "the values of sequences", _is_batches),
        Output(stats, "the statistics of an evaluation", _is_logit_stats),
    ]


def _has_keys(file: Path, *keys: str) -> bool:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= set(keys)


def _is_batches(file: Path) -> bool:
    with file.open("rb") as opened:
        line = opened.readline(LONGEST_LINE)
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and type(found.get("tokens")) is int and "baseline" in found


def _is_logit_stats(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    return "n" in names and all(name.endswith(("_marginal_probs", "_sufficient_stats")) for name in names - {"n"})


def write_results(evaluation: Evaluation, folder: str | Path, *, force: bool = False) -> list[Path]:
    """Write an evaluation into a folder. Create the folder if it is missing. Each file appears whole or not at all, and none before all are written.

    evaluation.json: `Evaluation.to_dict`. aggregate_metrics.json: `Evaluation.to_upstream`, in upstream's names, units
    and numbering of layers. batches.jsonl: a line for each sequence, `SequenceScores.to_upstream`.
    logit_stats.npz, with logit_stats: n, and <name>_marginal_probs and <name>_sufficient_stats
    [L, V] for the names model (L = 1), logit and tuned.
        float32; layer i is the output of block i. (Upstream writes the marginals as JSON: hundreds of megabytes for
        large vocabularies.)

    A batches.jsonl or logit_stats.npz of an earlier evaluation is deleted if this one has none.

    Args:
        evaluation: the results.
        folder: the folder.
        force: replace files of these names that are not of an evaluation.

    Returns:
        the files written.

    Raises:
        NotOursError: if the folder has a file of these names that is not of an evaluation.
        ValueError: if a number has no JSON form (NaN, infinity).
        OSError: if a file cannot be written.
    """
    folder = Path(folder).expanduser()
    outputs = result_outputs(folder)
    require_replaceable(outputs, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {RESULTS[0]: evaluation.to_dict(), RESULTS[1]: evaluation.to_upstream()}
    there = {RESULTS[2]: evaluation.sequences is not None, RESULTS[3]: evaluation.logit_stats is not None}
    written = [folder / name for name in RESULTS if there.get(name, True)]
    with contextlib.ExitStack() as stack:  # at its end all files are moved into place, one right after the other
        temporaries = {path.name: stack.enter_context(atomic_write(path)) for path in written}
        for name, data in contents.items():
            temporaries[name].write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
        if evaluation.sequences is not None:
            lines = (json.dumps(entry, allow_nan=False) + "\n" for entry in evaluation.sequences.to_upstream(evaluation.nats_to_bpb))
            with temporaries[RESULTS[2]].open("w", encoding="utf-8") as file:
                file.writelines(lines)
        if evaluation.logit_stats is not None:
            arrays: dict[str, Any] = {"n": np.array(evaluation.tokens)}
            for name, stats in evaluation.logit_stats.items():
                arrays[f"{name}_marginal_probs"] = stats.marginal_probs.astype(np.float32)
                arrays[f"{name}_sufficient_stats"] = stats.sufficient_stats.astype(np.float32)
            np.savez(temporaries[RESULTS[3]], allow_pickle=False, **arrays)
    for output in outputs:
        if not there.get(output.path.name, True) and output.path.is_file():
            output.path.unlink()
    return written
