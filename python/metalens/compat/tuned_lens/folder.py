"""Folders of tuned-lens: params.pt and config.json, on this machine or on the hub.

Upstream's translator i is y = h + A h + b of the INPUT of block i (0 is the embedding). The output of the last block
has no translator:

    W_i = I + A_ref[i+1], b_i = b_ref[i+1] for i < L-1;  W_{L-1} = I, b_{L-1} = 0;  `lens.embedding` keeps (A_ref[0], b_ref[0])

Source: tuned_lens/nn/lenses.py and load_artifacts.py of AlignmentResearch/tuned-lens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from metalens.compat.tuned_lens.torch_file import WRITABLE, read_tensors, write_tensors
from metalens.lenses.lens import TunedLens
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write
from metalens.utils.outputs import Output, require_replaceable
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


def is_tuned_lens(path: str | Path) -> bool:
    """Return whether the path is a folder of tuned-lens, or the params.pt of one. The names of the files decide."""
    folder = _folder(path)
    return (folder / PARAMS).is_file() and (folder / CONFIG).is_file()


def load(
    path_or_id: str | Path,
    repo_id: str | None = None,
    repo_type: str | None = None,
    revision: str = "main",
    subfolder: str = "lens",
    cache_dir: str | Path | None = None,
) -> TunedLens:
    """Read a lens of tuned-lens. This needs no torch, and runs nothing that the files contain.

    Args:
        path_or_id: a folder with params.pt and config.json; else the id of a lens on the Hugging Face hub, e.g.
            'EleutherAI/pythia-160m-deduped'.
        repo_id: repository on the hub. None = $TUNED_LENS_REPO_ID, or AlignmentResearch/tuned-lens.
        repo_type: type of the repository. None = $TUNED_LENS_REPO_TYPE, or 'space'.
        revision: revision of the repository.
        subfolder: folder of the repository that contains the lenses' folders.
        cache_dir: folder for downloads; None = the hub's own cache.

    Returns:
        a full lens in float32, with the identity as its last translator. `provenance` has the model's "model" and
        "revision", and the hash of the unembedding under "tuned_lens". `embedding` is the translator of the embedding
        if it is not zero. Adding I rounds the diagonal of A to 6e-8; all else is exact.

    Raises:
        FileNotFoundError: if there is no such folder, and the hub has no such lens or cannot be reached.
        InvalidValueError: if the files are damaged, disagree, or are not a lens.
    """
    if is_tuned_lens(path_or_id):
        params, config = _folder(path_or_id) / PARAMS, _folder(path_or_id) / CONFIG
    else:
        params, config = _download(str(path_or_id), repo_id, repo_type, revision, subfolder, cache_dir)
    described = _read_config(config)
    pieces: dict[int, dict[str, mx.array]] = {}
    for name, array in read_tensors(params, described.shapes):
        index, _, part = name.partition(".")
        if part == "weight" and index != "0":
            array.reshape(-1)[:: described.d_model + 1] += 1
        pieces.setdefault(int(index), {})[part] = mx.array(array)
    lens = TunedLens(described.num_hidden_layers, described.d_model)
    for i in range(1, described.num_hidden_layers):
        lens.translators[i - 1].update(pieces[i])
    first = pieces[0]["weight"], pieces[0].get("bias", mx.zeros((described.d_model,)))
    if any(to_float(mx.any(array != 0)) for array in first):
        lens.embedding = first
    facts = {"model": described.base_model_name_or_path, "revision": described.base_model_revision}
    lens.provenance = {key: value for key, value in facts.items() if value is not None}
    if described.unembed_hash is not None:
        lens.provenance["tuned_lens"] = {"unembed_hash": described.unembed_hash}
    return lens


def save(
    lens: TunedLens,
    folder: str | Path,
    model_name: str | None = None,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    force: bool = False,
) -> None:
    """Write a lens as params.pt and config.json, which upstream's TunedLens loads. Each file appears whole or not at all.

    Upstream has no translator for the last block's output. That translator is left out, with a warning if it is not the
    identity. The translator of the embedding is `lens.embedding`, or zero.

    Args:
        lens: a lens of any variant. Every translator is written as a full matrix.
        folder: folder for the files; it is created if it is missing.
        model_name: path or hub id of the model. None = the name that the lens remembers.
        revision: revision of the model. None = the revision that the lens remembers.
        dtype: number format of the tensors.
        force: replace files of these names that are not a lens of tuned-lens.

    Raises:
        NotOursError: if the folder has a params.pt or config.json that is not a lens's: every model has a config.json.
        InvalidValueError: if the name of the model is not known, the dtype is another, or a number has no finite form
            in this dtype.
        OSError: if a file cannot be written.
    """
    if dtype not in WRITABLE:
        raise InvalidValueError(f"dtype must be one of {', '.join(WRITABLE)}, got {dtype!r}.")
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a lens of tuned-lens is a folder with {PARAMS} and {CONFIG}. Give the name of a folder.")
    require_replaceable(folder_outputs(folder), force=force)
    remembered = lens.provenance.get("model")
    model_name = model_name or remembered
    if not isinstance(model_name, str):
        raise InvalidValueError(
            "config.json names the model of the lens, and this lens does not remember its model: give its name (--model, in Python model_name)."
        )
    own = model_name == remembered
    about: Any = lens.provenance.get("tuned_lens", {})
    unembed_hash = about.get("unembed_hash") if own and isinstance(about, dict) else None
    revision = revision or (lens.provenance.get("revision") if own else None)
    config = LensConfig(model_name, lens.hidden_dim, lens.num_layers, True, revision, unembed_hash)
    weight, bias = lens.dense(lens.num_layers - 1)
    if to_float(mx.any(weight != mx.eye(lens.hidden_dim))) or to_float(mx.any(bias != 0)):
        warn_caller(
            f"tuned-lens has no translator for the last block's output: that of layer {lens.num_layers - 1}, which is not the identity, is left out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PARAMS) as temporary:
        write_tensors(temporary, config.shapes(2 * lens.num_layers), _residuals(lens), dtype)
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")


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


def _residuals(lens: TunedLens) -> Iterator[mx.array]:
    """Yield A_ref[0], b_ref[0], A_ref[1], ... of upstream."""
    d = lens.hidden_dim
    yield from lens.embedding or (mx.zeros((d, d)), mx.zeros((d,)))
    for i in range(lens.num_layers - 1):
        weight, bias = lens.dense(i)
        yield weight.astype(mx.float32) - mx.eye(d)
        yield bias


def _folder(path: str | Path) -> Path:
    path = Path(path)
    return path.parent if path.name == PARAMS else path


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


def _download(
    resource: str, repo_id: str | None, repo_type: str | None, revision: str, subfolder: str, cache_dir: str | Path | None
) -> tuple[Path, Path]:
    """Return the paths of params.pt and config.json of a lens on the hub, downloaded or from the cache."""
    repo_id = repo_id or os.environ.get("TUNED_LENS_REPO_ID") or REPOSITORY
    repo_type = repo_type or os.environ.get("TUNED_LENS_REPO_TYPE") or REPOSITORY_TYPE
    missing = f"No lens at {resource!r}: it is no folder with {PARAMS} and {CONFIG}"
    try:
        from huggingface_hub import hf_hub_download  # comes with mlx-lm; slow to import
    except ImportError as error:
        raise FileNotFoundError(f"{missing}, and the hub cannot be read without huggingface_hub: pip install huggingface_hub.") from error
    where = f"{subfolder}/{resource}".strip("/")
    try:
        params, config = (
            Path(hf_hub_download(repo_id, name, subfolder=where, repo_type=repo_type, revision=revision, cache_dir=cache_dir))
            for name in (PARAMS, CONFIG)
        )
    except Exception as error:  # the network, the hub and its cache each raise types of their own
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{missing}, and {where!r} could not be downloaded from the hub's {repo_type} {repo_id}: {reason}") from error
    return params, config
