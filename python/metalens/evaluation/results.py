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
from metalens.models.layers import EMBEDDING, Layer, layers_in_order
from metalens.readings.numbering import upstream_layer
from metalens.utils.files import atomic_write
from metalens.utils.outputs import Output, require_replaceable

# The most layers that the text form of an evaluation shows.
MOST_ROWS = 24


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        tokens: number of positions scored.
        bytes_per_token: UTF-8 bytes of the text for each position.
        model: scores of the model's own predictions (kl 0, top1 1).
        logit: scores of the logit lens, one per layer; layer i is the output of block i.
        tuned: scores of the tuned lens, one per layer; None without a lens.
        transfer: layer transfer of the tuned lens, between the layers that it translates; None if it was not asked for.
        logit_stats: mean predictions {"model": one layer, "logit": L layers, "tuned": L layers if there is a lens}; of the embedding
            "logit embedding" and "tuned embedding", one layer each; None if not asked for.
        untranslated: layers that were measured, 'embedding' among them, of which the tuned lens has no translator. It reads them as the logit lens
            does, so tables, files, pictures and means of the tuned lens leave them out; `tuned`, `embedding`, `logit_stats` and `sequences`
            have them, to keep layer i at index i.
        embedding: scores of the embedding's output, {"logit", and "tuned" if there is a lens}; None if not asked for. No mean has them.
        sequences: values of every sequence, and the standard errors of the means; None if not known.
        token_shift: positions from a prediction to the token that it is scored against; 1 = the next token.
    """

    tokens: int
    bytes_per_token: float
    model: Scores
    logit: list[Scores]
    tuned: list[Scores] | None
    transfer: Transfer | None = None
    logit_stats: dict[str, LogitStats] | None = field(default=None, compare=False, repr=False)
    untranslated: tuple[Layer, ...] = ()
    embedding: dict[str, Scores] | None = None
    sequences: SequenceScores | None = field(default=None, compare=False, repr=False)
    token_shift: int = 1

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
            rows.insert(0, f"{'embed.':>6}" + "".join(self._cells(name, EMBEDDING) for name in lenses))
        if self.translated:
            chosen = {name: [scores[i] for i in self.translated] for name, scores in lenses.items()}
            rows.append(f"{'mean':>6}" + "".join(_cells(_mean(s.kl for s in scores), _mean(s.top1 for s in scores)) for scores in chosen.values()))
        if 0 < len(self.translated) < len(self.logit):
            rows.append(f"The mean is over the {len(self.translated)} layers that the lens translates.")
        if self.token_shift != 1:
            rows.append(shift_remark(self.token_shift))
        return "\n".join(lines + rows)

    def _cells(self, lens: str, layer: Layer) -> str:
        """Return the cells of a lens in the row of a layer."""
        scores = self.scores(lens, layer)
        return f"  {'-':>9}  {'-':>6}" if scores is None else _cells(scores.kl, scores.top1)

    def scores(self, lens: str, layer: Layer) -> Scores | None:
        """Return the scores of a lens ('logit' or 'tuned') at a layer; None if it was not measured, or the lens does not translate it."""
        if lens == "tuned" and layer in self.untranslated:
            return None
        if layer == EMBEDDING:
            return (self.embedding or {}).get(lens)
        of_lens = self.logit if lens == "logit" else self.tuned
        return None if of_lens is None else of_lens[layer]

    @property
    def translated(self) -> list[int]:
        """Return the blocks that the tuned lens translates; without one, and for lenses that are functions, all of them."""
        return [layer for layer in range(len(self.logit)) if layer not in self.untranslated]

    @property
    def nats_to_bpb(self) -> float:
        """Return the bits per byte for each nat per token: 1 / (bytes_per_token * ln 2)."""
        return 1 / (self.bytes_per_token * math.log(2))

    @property
    def bias(self) -> dict[str, list[float]] | None:
        """Return KL(marginal of the model || marginal of the lens) in nats per token; None without logit_stats.

        Returns:
            {"logit": [L], and "tuned": [L] if there is a lens}; of the embedding "logit embedding" and "tuned embedding", [1] each.
        """
        if self.logit_stats is None:
            return None
        model = self.logit_stats["model"]
        return {name: bias(model, stats) for name, stats in self.logit_stats.items() if name != "model"}

    def standard_errors(self, lens: str, score: str) -> list[float] | None:
        """Return the standard errors of the means of a lens, one for each layer, by the spread over sequences; None for fewer than two sequences.

        Args:
            lens: 'model' (one layer), 'logit' or 'tuned'; with the embedding also 'logit embedding' and 'tuned embedding' (one layer). NaN for layers
                that the tuned lens does not translate.
            score: 'kl', 'ce', 'entropy' (nats per token) or 'top1' (0 to 1).
        """
        found = None if self.sequences is None else self.sequences.standard_errors(lens, score)
        return None if found is None else [float(value) for value in found]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON holds it, in nats per token unless a name gives the unit.

        Returns:
            {"tokens", "bytes_per_token", "token_shift", "model": {...}, "layers": [{"layer", "logit": {...}, "tuned": {...}}, ...]},
            where {...} has the fields of `Scores`. A layer that the tuned lens does not translate has no "tuned". With
            logit_stats, "logit" and "tuned" also have "bias" and "bias_bits" (bits per token). With transfer there is
            also "transfer": {"ce", "kl", "kl_model"}, each [translator][layer] of its "layers"; with the embedding "embedding": {"logit", "tuned"},
            as the entry of a layer; and of two sequences or more "sequences", their number, and "standard_errors": {lens: {"kl": [L],
            "ce": [L]}}, null for layers that the lens does not translate.
        """
        layers = [{"layer": layer, **self._entry(layer)} for layer in range(len(self.logit))]
        result: dict[str, Any] = {"tokens": self.tokens, "bytes_per_token": self.bytes_per_token, "token_shift": self.token_shift}
        result |= {"model": asdict(self.model), "layers": layers}
        if self.embedding is not None:
            result["embedding"] = self._entry(EMBEDDING)
        if self.sequences is not None and len(self.sequences) > 1:
            result["sequences"] = len(self.sequences)
            kept = [lens for lens in self.sequences.sums if any(layer not in self.sequences.left_out(lens) for layer in self.sequences.layers(lens))]
            result["standard_errors"] = {
                lens: {name: [None if math.isnan(error) else error for error in self.standard_errors(lens, name) or []] for name in ("kl", "ce")}
                for lens in kept
            }
        return result if self.transfer is None else result | {"transfer": asdict(self.transfer) | {"layers": list(self.transfer.layers)}}

    def _entry(self, layer: Layer) -> dict[str, dict[str, float]]:
        """Return the scores of the lenses at a layer, with their bias if there are logit_stats, as JSON holds them."""
        entry, biases = {}, self.bias
        for lens in ("logit", "tuned"):
            scores = self.scores(lens, layer)
            if scores is not None:
                entry[lens] = asdict(scores)
                if biases is not None:
                    bias = biases[f"{lens} {EMBEDDING}"][0] if layer == EMBEDDING else biases[lens][layer]
                    entry[lens] |= {"bias": bias, "bias_bits": bias / math.log(2)}
        return entry

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
        ratio, fields = self.nats_to_bpb, {"ce": "bits_per_byte", "entropy": "entropy_bits_per_byte", "kl": "kl_bits_per_byte"}
        own = {name: {"final": getattr(self.model, fields[name])} for name in ("ce", "entropy")}
        result: dict[str, Any] = {"baseline": own}
        for lens in ("logit",) if self.tuned is None else ("logit", "tuned"):
            found = {upstream_layer(layer): self.scores(lens, layer) for layer in layers_in_order(len(self.logit))}
            result[lens] = {
                name: {f"layer_{number}": getattr(scores, key) for number, scores in found.items() if scores is not None}
                for name, key in fields.items()
            }
        if self.transfer is not None:
            names = [f"layer_{upstream_layer(layer)}" for layer in self.transfer.layers]
            result["tuned"]["layer_transfer"] = {
                name: {row: dict(zip(names, (value * ratio for value in values), strict=True)) for row, values in zip(names, matrix, strict=True)}
                for name, matrix in (("ce", self.transfer.ce), ("kl", self.transfer.kl), ("kl_model", self.transfer.kl_model))
            }
        return result


def shift_remark(token_shift: int) -> str:
    """Say in a sentence what the predictions are scored against."""
    return f"Scored against the token {token_shift} positions from each prediction (token_shift), and the model's own prediction of that token."


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
    return "n" in names and all(name.endswith(("_marginal_probs", "_sufficient_stats")) for name in names - {"n", "tuned_layers"})


def write_results(evaluation: Evaluation, folder: str | Path, *, force: bool = False) -> list[Path]:
    """Write an evaluation into a folder. Create the folder if it is missing. Each file appears whole or not at all, and none before all are written.

    evaluation.json: `Evaluation.to_dict`. aggregate_metrics.json: `Evaluation.to_upstream`, in upstream's names, units
    and numbering of layers. batches.jsonl: a line for each sequence, `SequenceScores.to_upstream`.
    logit_stats.npz, with logit_stats: n, and <name>_marginal_probs and <name>_sufficient_stats
    [L, V] for the names model (L = 1), logit and tuned, with the embedding also logit_embedding and tuned_embedding (L = 1). float32; layer i is
    the output of block i, and tuned has the rows of the layers tuned_layers. (Upstream writes the marginals as JSON: hundreds of megabytes
    for large vocabularies.)

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
            if evaluation.tuned is not None:
                arrays["tuned_layers"] = np.array(evaluation.translated, np.int64)
            for name, stats in evaluation.logit_stats.items():
                if name == f"tuned {EMBEDDING}" and EMBEDDING in evaluation.untranslated:
                    continue
                rows = evaluation.translated if name == "tuned" else slice(None)
                arrays[f"{name.replace(' ', '_')}_marginal_probs"] = stats.marginal_probs[rows].astype(np.float32)
                arrays[f"{name.replace(' ', '_')}_sufficient_stats"] = stats.sufficient_stats[rows].astype(np.float32)
            np.savez(temporaries[RESULTS[3]], allow_pickle=False, **arrays)
    for output in outputs:
        if not there.get(output.path.name, True) and output.path.is_file():
            output.path.unlink()
    return written
