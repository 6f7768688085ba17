"""Trajectories and comparisons as files and tables: JSON, safetensors, pandas.

docs/reference/file-formats.md describes the files. A document is plain JSON, whose arrays are leaves that a packer writes: base64 in a .json
file, tensors beside the document in a .safetensors file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.readings.comparison_data import ComparisonData
from metalens.readings.numbering import Layer
from metalens.readings.statistics import DIVERGENCES, STATISTICS, Cells
from metalens.readings.trajectory_data import TrajectoryData
from metalens.utils.errors import InvalidValueError, MissingPackageError
from metalens.utils.files import atomic_write, sha256_of_values
from metalens.utils.outputs import Output, require_replaceable
from metalens.utils.token_display import visible

FORMAT, COMPARISON, VERSION = "metalens.trajectory", "metalens.comparison", 2
DTYPES = ("float32", "float16", "int32", "uint32")
TENSOR = "tensor"  # key of a leaf in a .safetensors file
CHECKSUM = "sha256"  # of the other keys of a .json file, and of the document and the tensors of a .safetensors file

Pack = Callable[[np.ndarray], dict[str, Any]]
Unpack = Callable[[Any], np.ndarray]


# ------------------------------------------------------------------ JSON


def trajectory_json(trajectory: TrajectoryData, *, compact: bool = False) -> dict[str, Any]:
    """Return a trajectory as plain JSON types, without NaN: its arrays are base64 of little-endian numbers.

    Args:
        trajectory: the trajectory.
        compact: write floats as float16, half the size.

    Returns:
        the document that docs/reference/file-formats.md describes.
    """
    return _document(trajectory, _packer(compact))


def comparison_json(comparison: ComparisonData, *, compact: bool = False, trajectories: bool = True) -> dict[str, Any]:
    """Return a comparison as plain JSON types, with its two trajectories.

    Args:
        comparison: the comparison.
        compact: as in `trajectory_json`.
        trajectories: leave the trajectories out if false.
    """
    pack, c = _packer(compact), comparison
    layers = [{"layer": layer, "label": label} for layer, label in zip(c.a.layers, c.labels, strict=False)]
    return {
        "format": COMPARISON,
        "version": VERSION,
        "metalens": version("metalens"),
        "between": c.between,
        "names": list(c.names),
        "layers": layers,
        "token_ids": c.a.token_ids.tolist(),
        "other_token_ids": c.b.token_ids.tolist(),
        "statistics": divergences_json(c.to_numpy(), compact=compact),
        "a": _document(c.a, pack) if trajectories else None,
        "b": _document(c.b, pack) if trajectories and c.b is not c.a else None,
    }


def divergences_json(values: Mapping[str, np.ndarray], *, compact: bool = False) -> dict[str, Any]:
    """Return the divergences {name: [R, T]} of a comparison, or of a part of one, as `comparison_json` has them under "statistics"."""
    pack = _packer(compact)
    return {name: {**info._asdict(), "values": pack(values[name])} for name, info in DIVERGENCES.items()}


def _packer(compact: bool) -> Pack:
    def pack(a: np.ndarray) -> dict[str, Any]:
        kind = "float16" if compact and a.dtype == np.float32 else a.dtype.name
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(a).astype(np.dtype(kind).newbyteorder("<"))
        return {"dtype": kind, "shape": list(a.shape), "base64": base64.b64encode(data.tobytes()).decode("ascii")}

    return pack


def _unpacked(leaf: Any) -> np.ndarray:
    if leaf["dtype"] not in DTYPES:
        raise ValueError(f"an array of {leaf['dtype']}")
    data = np.frombuffer(base64.b64decode(leaf["base64"], validate=True), np.dtype(leaf["dtype"]).newbyteorder("<")).reshape(leaf["shape"])
    return data.astype(np.float32 if data.dtype.kind == "f" else np.int32)


def _document(t: TrajectoryData, pack: Pack) -> dict[str, Any]:
    own = t.model.statistics()
    statistics = {
        name: {**STATISTICS[name]._asdict(), "values": pack(values), "model": pack(own[name][0])} for name, values in t.statistics().items()
    }
    ids = sorted(t.texts)

    def top(cells: Cells) -> dict[str, Any]:
        return {"ids": pack(cells.top_ids.astype(np.uint32)), "log_probabilities": pack(cells.top_logits - cells.lse[..., None])}

    return {
        "format": FORMAT,
        "version": VERSION,
        "metalens": version("metalens"),
        "model": {"name": t.model_name, "num_layers": t.num_layers, "vocab_size": t.vocab_size},
        "lens": {"name": t.lens},
        "mask_input": t.mask_input,
        "layers": [{"layer": layer, "label": t.label(layer), "translated": layer not in t.untranslated} for layer in t.layers],
        "first_position": t.first_position,
        "token_ids": t.token_ids.tolist(),
        "target_ids": None if t.target_ids is None else t.target_ids.tolist(),
        "anti_target_ids": None if t.anti_target_ids is None else t.anti_target_ids.tolist(),
        "vocabulary": {"ids": ids, "text": [t.texts[i] for i in ids], "display": [visible(t.texts[i]) for i in ids]},
        "statistics": statistics,
        "prediction_depth": t.prediction_depth.tolist(),
        "lse": {"values": pack(t.lse), "model": pack(t.model.lse[0])},
        "top": {**top(t), "model": {name: _without_row(leaf) for name, leaf in top(t.model).items()}},
        "chosen": {
            "ids": list(t.chosen_ids),
            "log_probabilities": pack(t.chosen_log_probs),
            "ranks": pack(t.chosen_ranks),
            "model": {"log_probabilities": pack(t.model.chosen_log_probs[:, 0]), "ranks": pack(t.model.chosen_ranks[:, 0])},
        },
    }


def _without_row(leaf: dict[str, Any]) -> dict[str, Any]:
    """Return the leaf of an array [1, ...] as that of [...]: the same numbers."""
    return {**leaf, "shape": leaf["shape"][1:]} if "shape" in leaf else leaf


def trajectory_fields(data: Any) -> dict[str, Any]:
    """Return the fields of the trajectory that `trajectory_json` wrote, without its source. Logits come from the log-probabilities.

    Raises:
        InvalidValueError: if it is none, or of another version.
    """
    return _checked(data, _unpacked)


def _checked(data: Any, unpack: Unpack) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InvalidValueError("This is no trajectory of metalens: its 'format' is not 'metalens.trajectory'.")
    if data.get("version") != VERSION:
        raise InvalidValueError(f"The trajectory has version {data.get('version')!r:.20}; this metalens reads version {VERSION}. Update metalens.")
    try:
        return _read(data, unpack)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise InvalidValueError(f"The trajectory is damaged: {type(error).__name__} {error!s:.100}. Write it again.") from error


def _read(data: dict[str, Any], unpack: Unpack) -> dict[str, Any]:
    layers: tuple[Layer, ...] = tuple(entry["layer"] for entry in data["layers"])
    rows, columns = len(layers), len(data["token_ids"])

    def cells(of_model: bool, shape: tuple[int, int]) -> Cells:
        def leaf(entry: dict[str, Any], name: str, *lead: int) -> np.ndarray:
            values = unpack(entry["model"] if of_model and name == "values" else (entry["model"] if of_model else entry)[name])
            return values.reshape(*lead, *shape, *values.shape[len(lead) + (1 if of_model else 2) :])

        lse, top, chosen = leaf(data["lse"], "values"), data["top"], data["chosen"]
        count = len(chosen["ids"])
        return Cells(
            **{name: leaf(entry, "values") for name, entry in data["statistics"].items() if name in STATISTICS},
            lse=lse,
            top_ids=leaf(top, "ids"),
            top_logits=leaf(top, "log_probabilities") + lse[..., None],
            chosen_log_probs=leaf(chosen, "log_probabilities", count),
            chosen_ranks=leaf(chosen, "ranks", count),
        )

    def ids(name: str) -> np.ndarray | None:
        return None if data[name] is None else np.array(data[name], np.int32).reshape(columns)

    vocabulary, model = data["vocabulary"], data["model"]
    return dict(
        **vars(cells(False, (rows, columns))),
        layers=layers,
        token_ids=np.array(data["token_ids"], np.int32),
        target_ids=ids("target_ids"),
        anti_target_ids=ids("anti_target_ids"),
        chosen_ids=tuple(data["chosen"]["ids"]),
        texts=dict(zip(vocabulary["ids"], vocabulary["text"], strict=True)),
        first_position=data["first_position"],
        lens=data["lens"]["name"],
        untranslated=tuple(entry["layer"] for entry in data["layers"] if not entry["translated"]),
        mask_input=data["mask_input"],
        model_name=model["name"],
        num_layers=model["num_layers"],
        vocab_size=model["vocab_size"],
        model=cells(True, (1, columns)),
    )


# ------------------------------------------------------------------ files


def save_trajectory(trajectory: TrajectoryData, path: str | Path, *, force: bool = False) -> None:
    """Write a trajectory. The suffix tells the format: .json, or .safetensors, which is smaller. The file appears whole or not at all.

    Args:
        trajectory: the trajectory.
        path: path of the file.
        force: replace a file that is no trajectory.

    Raises:
        InvalidValueError: for another suffix, or if the file exists and is no trajectory.
        OSError: if the file cannot be written.
    """
    path = require_trajectory_output(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        _write_json(path, trajectory_json(trajectory))
        return
    tensors: dict[str, mx.array] = {}

    def pack(a: np.ndarray) -> dict[str, Any]:
        name = f"array_{len(tensors)}"
        tensors[name] = mx.array(np.ascontiguousarray(a)) if a.size else mx.array(np.zeros(1, a.dtype))  # safetensors holds no empty arrays here
        return {TENSOR: name, "shape": list(a.shape)}

    document = json.dumps(_document(trajectory, pack))
    metadata = {"metalens": document, CHECKSUM: _sha256_of_tensors(document, tensors)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a full disk is an OSError of the file, and a RuntimeError of MLX's own
        mx.save_safetensors(file, tensors, metadata)


def _sha256_of_tensors(document: str, tensors: Mapping[str, mx.array]) -> str:
    found = hashlib.sha256(document.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + np.array(tensor).tobytes())
    return found.hexdigest()


def require_trajectory_output(path: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Check before the work that a trajectory can be written to `path`, and return it as a Path.

    Args:
        path, force: as in `save_trajectory`.
        inputs: files that the same call reads, which are never replaced.

    Raises:
        InvalidValueError, OSError: as `save_trajectory`, and if `path` is one of the inputs.
    """
    return _output(path, FORMAT, (".json", ".safetensors"), force, inputs)


def load_fields(path: str | Path) -> dict[str, Any]:
    """Return the fields of a trajectory that `save_trajectory` wrote. It has no source: it can be shown, not read again.

    A file of an older version has no checksum, and is not compared with it.

    Raises:
        OSError: if there is no such file.
        InvalidValueError: if it is no trajectory, or damaged.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return trajectory_fields(_parsed(path))
    path.open("rb").close()  # an OSError that names the file
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        document = metadata.get("metalens", "null")
        data = json.loads(document)
    except (RuntimeError, ValueError) as error:
        raise InvalidValueError(f"{path} is no trajectory of metalens: {error!s:.100}.") from error
    if metadata.get(CHECKSUM) not in (None, _sha256_of_tensors(document, arrays)):
        raise InvalidValueError(_changed(path))

    def unpack(leaf: Any) -> np.ndarray:
        found = np.array(arrays[leaf[TENSOR]])
        found = found[:0] if 0 in leaf["shape"] else found
        return found.reshape(leaf["shape"]).astype(np.float32 if found.dtype.kind == "f" else np.int32)

    return _checked(data, unpack)


def save_comparison(comparison: ComparisonData, path: str | Path, *, force: bool = False) -> None:
    """Write a comparison with its trajectories as .json. Errors as `save_trajectory`."""
    path = _output(path, COMPARISON, (".json",), force)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, comparison_json(comparison))


def _output(path: str | Path, form: str, suffixes: tuple[str, ...], force: bool, inputs: Iterable[str | Path] = ()) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in suffixes:
        raise InvalidValueError(f"Can't write {path.name!r}: the suffix must be {' or '.join(suffixes)}.")
    kind = f"a {form.partition('.')[2]}"
    require_replaceable([Output(path, kind, lambda existing: _has_format(existing, form))], force=force, inputs=inputs)
    return path


def _has_format(path: Path, form: str) -> bool:
    """Return whether a file is a document of this format, by its first bytes or by the header of safetensors."""
    with path.open("rb") as file:
        start = file.read(64)
        if path.suffix == ".safetensors":
            length = int.from_bytes(start[:8], "little")
            if length > path.stat().st_size:
                return False
            file.seek(8)
            try:
                start = json.loads(file.read(length))["__metadata__"]["metalens"].encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return False
    return re.match(rb'\s*\{\s*"format":\s*"' + re.escape(form.encode()) + b'"', start) is not None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data | {CHECKSUM: sha256_of_values(data)}, allow_nan=False, ensure_ascii=True), encoding="ascii")


def _parsed(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{path} is no trajectory of metalens: {error!s:.100}.") from error
    if isinstance(data, dict) and data.pop(CHECKSUM, None) not in (None, sha256_of_values(data)):
        raise InvalidValueError(_changed(path))
    return data


def _changed(path: Path) -> str:
    return f"{path} has changed since it was written: it is damaged, or was edited. Write it again, or take its {CHECKSUM!r} out if you edited it."


# ------------------------------------------------------------------ pandas


def data_frame(trajectory: TrajectoryData) -> Any:
    """Return a pandas DataFrame with one row per layer and position.

    The columns are layer, position, token (the token that was read), prediction (the most likely next token), every statistic that was
    computed, and the probability and the rank of each chosen token, 'p( Paris)' and 'rank( Paris)'.

    Raises:
        MissingPackageError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingPackageError("Trajectory.to_pandas needs pandas: pip install pandas. Trajectory.to_numpy needs no package.") from error
    t = trajectory
    rows, columns = len(t.layers), len(t)
    table: dict[str, Any] = {
        "layer": np.repeat(np.array(t.layers, object), columns),
        "position": np.tile(np.array(t.positions), rows),
        "token": t.tokens * rows,
        "prediction": [t.texts[int(i)] for i in t.top_ids[..., 0].reshape(-1)],
    }
    table |= {name: values.reshape(-1) for name, values in t.statistics().items()}
    for i, token in enumerate(t.chosen_ids):
        table[f"p({t.texts[token]})"] = t.chosen_probabilities[i].reshape(-1)
        table[f"rank({t.texts[token]})"] = t.chosen_ranks[i].reshape(-1)
    return pd.DataFrame(table)
