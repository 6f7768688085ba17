"""Folders of tuned-lens, which hold params.pt and config.json: on this machine, or on the Hugging Face hub.

Upstream's translator i is y = h + A h + b of the INPUT of block i (0 is the embedding). The output of the last block has no translator:

    W_i = I + A_ref[i+1], b_i = b_ref[i+1] for i < L-1;  W_{L-1} = I, b_{L-1} = 0;  the embedding's W = I + A_ref[0], b = b_ref[0]

Source: tuned_lens/nn/lenses.py and load_artifacts.py of AlignmentResearch/tuned-lens.
This module knows files and arrays; `lenses.lens` builds the lens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens_file import LensData, LensDescription
from metalens.lenses.torch_file import read_tensors
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError
from metalens.utils.outputs import Output
from metalens.utils.warn import warn_caller

PARAMS, CONFIG = "params.pt", "config.json"
REPOSITORY, REPOSITORY_TYPE = "AlignmentResearch/tuned-lens", "space"
# The largest config.json that is read, in bytes.
CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True)
class LensConfig:
    """The contents of config.json, with the fields of upstream's TunedLensConfig.

    `unembed_hash` is the sha256 of NumPy's abbreviated print-out of the unembedding. It depends on NumPy's version and
    on the quantization, so it is kept and never checked.
    """

    base_model_name_or_path: str
    d_model: int
    num_hidden_layers: int
    bias: bool = True
    base_model_revision: str | None = None
    unembed_hash: str | None = None
    lens_type: str = "linear_tuned_lens"

    def __post_init__(self) -> None:
        texts = (self.base_model_revision, self.unembed_hash)
        if not isinstance(self.base_model_name_or_path, str) or not all(isinstance(text, str | None) for text in texts):
            raise InvalidValueError("base_model_name_or_path must be text, base_model_revision and unembed_hash text or null")
        if type(self.d_model) is not int or type(self.num_hidden_layers) is not int or self.d_model < 1 or self.num_hidden_layers < 1:
            raise InvalidValueError(
                f"d_model and num_hidden_layers must be positive whole numbers, got {self.d_model!r:.50}, {self.num_hidden_layers!r:.50}"
            )
        if type(self.bias) is not bool or self.lens_type != "linear_tuned_lens":
            raise InvalidValueError(f"bias must be true or false and lens_type 'linear_tuned_lens', got {self.bias!r:.50} and {self.lens_type!r:.50}")

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of the tensors in params.pt. Stop one layer after `count` tensors: a damaged file may claim any number of layers."""
        parts: dict[str, tuple[int, ...]] = {"weight": (self.d_model, self.d_model)} | ({"bias": (self.d_model,)} if self.bias else {})
        layers = min(self.num_hidden_layers, count // len(parts) + 1)
        return {f"{i}.{part}": shape for i in range(layers) for part, shape in parts.items()}


def folder_of(path: str | Path) -> Path:
    """Return the folder of a lens that is named by its folder or by its params.pt."""
    path = Path(path).expanduser()
    return path.parent if path.name == PARAMS else path


def is_tuned_lens(path: str | Path) -> bool:
    """Return whether the path is a folder of tuned-lens, or the params.pt of one. The names of the files decide."""
    folder = folder_of(path)
    return (folder / PARAMS).is_file() and (folder / CONFIG).is_file()


def folder_outputs(folder: str | Path) -> list[Output]:
    """Return the two files of a lens that is going to be written."""
    config = Path(folder).expanduser() / CONFIG
    return [
        Output(config, "the configuration of a tuned lens", _is_config),
        Output(config.with_name(PARAMS), "the weights of a tuned lens", lambda _: config.is_file() and _is_config(config)),
    ]


def _is_config(file: Path) -> bool:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= CONFIG_LIMIT else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"base_model_name_or_path", "d_model", "num_hidden_layers"} <= found.keys()


def read_folder(folder: str | Path) -> LensData:
    """Read a folder of tuned-lens. This needs no torch, and runs nothing that the files contain.

    Returns:
        a full lens in float32, with the identity as its last translator. Adding I rounds the diagonal of A to 6e-8; all else is
        exact. A translator of the embedding that is zero is left out. The provenance has the model's "model" and "revision",
        and the hash of the unembedding under "tuned_lens".

    Raises:
        InvalidValueError: if the files are damaged, disagree, or are not a lens.
        OSError: if they can't be read.
    """
    folder = folder_of(folder)
    return _read(folder / PARAMS, folder / CONFIG)


def read_hub_lens(
    lens_id: str,
    repo_id: str | None = None,
    repo_type: str | None = None,
    revision: str = "main",
    subfolder: str = "lens",
    cache_dir: str | Path | None = None,
    *,
    may_be_folder: bool = True,
) -> LensData:
    """Read a lens of tuned-lens's collection on the hub, downloaded or from the cache.

    Args:
        lens_id, repo_id, repo_type, revision, subfolder, cache_dir: as in `metalens.compat.tuned_lens.load`.
        may_be_folder: whether the caller may have meant a folder on this machine, for the error.

    Raises:
        FileNotFoundError: if the hub has no such lens or can't be reached.
        InvalidValueError: as `read_folder`.
    """
    repo_id, repo_type = hub_repository(repo_id, repo_type)
    where = f"{subfolder}/{lens_id}".strip("/")
    no_folder = f"No lens at {lens_id!r}: it is no folder with {PARAMS} and {CONFIG}, and "
    try:
        from huggingface_hub import hf_hub_download  # comes with mlx-lm; slow to import
    except ImportError as error:
        missing = "the hub cannot be read without huggingface_hub: pip install huggingface_hub."
        raise FileNotFoundError(no_folder + missing if may_be_folder else missing.capitalize()) from error
    try:
        params, config = (
            Path(hf_hub_download(repo_id, name, subfolder=where, repo_type=repo_type, revision=revision, cache_dir=cache_dir))
            for name in (PARAMS, CONFIG)
        )
    except Exception as error:  # the network, the hub and its cache each raise types of their own
        reason = str(error).strip().partition("\n")[0]
        if may_be_folder:
            raise FileNotFoundError(f"{no_folder}{where!r} could not be downloaded from the hub's {repo_type} {repo_id}: {reason}") from error
        raise FileNotFoundError(f"The hub's {repo_type} {repo_id} has no lens {lens_id!r} ({where}), or can't be reached: {reason}") from error
    return _read(params, config)


def hub_repository(repo_id: str | None, repo_type: str | None) -> tuple[str, str]:
    """Return the repository of lenses and its type: the given ones, else those of the environment, else tuned-lens's."""
    return (
        repo_id or os.environ.get("TUNED_LENS_REPO_ID") or REPOSITORY,
        repo_type or os.environ.get("TUNED_LENS_REPO_TYPE") or REPOSITORY_TYPE,
    )


def _read(params: Path, config: Path) -> LensData:
    described = _read_config(config)
    return lens_of(described, read_tensors(params, described.shapes))


def lens_of(described: LensConfig, tensors: Iterable[tuple[str, np.ndarray]]) -> LensData:
    """Return the lens that upstream's tensors are.

    Args:
        described: facts of the lens.
        tensors: (name, array) of all its `shapes`; the arrays are changed.
    """
    pieces: dict[int, dict[str, mx.array]] = {}
    for name, array in tensors:
        index, _, part = name.partition(".")
        if part == "weight":
            array.reshape(-1)[:: described.d_model + 1] += 1
        pieces.setdefault(int(index), {})[part] = mx.array(array)
    identity = {"weight": mx.eye(described.d_model), "bias": mx.zeros((described.d_model,))}
    embedding = identity | pieces[0]
    moved = any(to_float(mx.any(embedding[part] != identity[part])) for part in identity)
    translators = {i - 1: identity | pieces[i] for i in range(1, described.num_hidden_layers)} | {described.num_hidden_layers - 1: identity}
    provenance: dict[str, Any] = {"model": described.base_model_name_or_path} if described.base_model_name_or_path else {}
    if described.base_model_revision is not None:
        provenance["revision"] = described.base_model_revision
    if described.unembed_hash is not None:
        provenance["tuned_lens"] = {"unembed_hash": described.unembed_hash}
    about = LensDescription(described.num_hidden_layers, described.d_model, provenance=provenance)
    return LensData(about, translators, embedding if moved else None)


def _read_config(file: Path) -> LensConfig:
    try:
        if file.stat().st_size > CONFIG_LIMIT:
            raise InvalidValueError(f"it has {file.stat().st_size} bytes")
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise InvalidValueError("it is no JSON object")
        known = [field.name for field in fields(LensConfig)]
        config = LensConfig(**{key: found[key] for key in known if key in found})
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidValueError(f"{file} does not describe a lens of tuned-lens: {error}.") from error
    unknown = sorted(set(found) - set(known))
    if unknown:
        warn_caller(f"{file}: ignoring {', '.join(unknown[:4])}, which tuned-lens's configurations do not have.")
    return config
