"""Flip one bit after another in every file, and read it as metalens does."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hard_life.jobs import NEWER, Job, restored
from hard_life.trials import Bench, Found, require

NOT_READ = "not read by metalens"
UNCHECKED = ("convert (a model)",)  # the format is mlx-lm's, and has no checksums
NOTICED, WARNED, ANEW, SAME, SILENT = "an error", "a warning", "read as missing, and made again", "no change", "other numbers, without a word"


def flipped(bench: Bench, job: Job, flips: int, seed: int = 0) -> Found:
    """Flip single bits of each file of a job, at random places, and read it. The states are the ways in which that was noticed."""
    readers = READERS.get(job.name, {})
    result = bench.scratch / "flips"

    def flip_all() -> None:
        rng = np.random.default_rng(seed)
        found = {name: _flips(bench.work, job.files[name], reader, flips, rng) for name, reader in readers.items()}
        result.write_text(json.dumps(found))

    with restored(bench.work, bench.inputs):
        require(bench.run(job.arguments(NEWER)))
        require(bench.call(flip_all))
    states = {name: Counter(counted) for name, counted in json.loads(result.read_text()).items()}
    wrong = [f"{job.name}: {name}: {counted[SILENT]} flipped bits gave {SILENT}" for name, counted in states.items() if counted[SILENT]]
    return Found(flips, {name: states.get(name, Counter({NOT_READ: 1})) for name in job.files}, Counter(), [] if job.name in UNCHECKED else wrong)


def _flips(folder: Path, pattern: str, reader: Callable[[], Any], flips: int, rng: np.random.Generator) -> Counter[str]:
    path = max(folder.glob(pattern))
    whole, expected = path.read_bytes(), _read(reader)[1]
    counted: Counter[str] = Counter()
    for bit in rng.choice(8 * len(whole), min(flips, 8 * len(whole)), replace=False).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        kind, content = _read(reader)
        counted[kind if kind != SAME or content == expected else SILENT] += 1
    path.write_bytes(whole)
    return counted


def _read(reader: Callable[[], Any]) -> tuple[str, Any]:
    """Return how reading went, and what was read."""
    from metalens.utils.errors import MetalensError

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            content = reader()
        except (MetalensError, OSError):
            return NOTICED, None
    if content is None:
        return ANEW, None
    return (WARNED if said else SAME), _comparable(content)


def _comparable(content: Any) -> Any:
    """Return a content as plain values: arrays as their bytes."""
    import mlx.core as mx

    if is_dataclass(content) and not isinstance(content, type):
        content = vars(content)
    if isinstance(content, dict):
        return {key: _comparable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_comparable(value) for value in content]
    if not hasattr(content, "shape"):
        return content
    return np.array(content.view(mx.uint16) if content.dtype == mx.bfloat16 else content).tobytes()


def _lens() -> Any:
    from mlx.utils import tree_flatten

    from metalens import TunedLens

    lens = TunedLens.load("lens")
    return dict(tree_flatten(lens.parameters())), lens.provenance


def _checkpoint() -> Any:
    from metalens.training import CheckpointFolder

    found = CheckpointFolder(Path("lens.checkpoints")).latest()
    return found and (found.arrays, found.record)


def _tokens() -> Any:
    from metalens.training.data.cache import TokenCache

    (key,) = {path.stem for path in Path("cache").glob("*.json")}
    found = TokenCache().open(key)
    return found and (found.ids, found.ids.dtype.str, found.documents, found.counts)


def _upstream() -> Any:
    from mlx.utils import tree_flatten

    from metalens.compat import load_lens

    return dict(tree_flatten(load_lens("upstream").parameters()))


def _trajectory(file: str) -> Callable[[], Any]:
    def read() -> Any:
        from metalens.readings.export import load_fields

        return load_fields(file)

    return read


def _model() -> Any:
    import mlx.core as mx

    try:
        return mx.load("converted/model.safetensors"), json.loads(Path("converted/config.json").read_text())
    except (RuntimeError, ValueError, UnicodeDecodeError) as error:  # of MLX and mlx-lm, which the command line shows in a line
        raise OSError(str(error)) from error


def _basis() -> Any:
    from metalens.analysis import CausalBasis

    return CausalBasis.load("basis/layer-000.npz")


def _result() -> Any:
    from metalens.sweep.cells import lens_cells
    from metalens.sweep.settings import read_sweep

    (cell,) = lens_cells(read_sweep(f"sweep{NEWER}.toml"))
    return cell.result(Path("sweep"))


# {job: {name of a file: function that reads it}}
READERS: dict[str, dict[str, Callable[[], Any]]] = {
    "train": {
        "lens.npz": _lens,
        "lens.json": _lens,
        "state.safetensors": _checkpoint,
        "state.json": _checkpoint,
        "KEY.ids": _tokens,
        "KEY.documents": _tokens,
        "KEY.json": _tokens,
    },
    "lens": {"trajectory.safetensors": _trajectory("read.safetensors")},
    "lens (JSON)": {"trajectory.json": _trajectory("read.json")},
    "convert (a lens)": {"params.pt": _upstream, "config.json of a lens": _upstream},
    "convert (a model)": {"model.safetensors": _model, "config.json": _model},
    "analyze causal": {"basis of a layer": _basis},
    "sweep": {"result.json of a cell": _result},
}
