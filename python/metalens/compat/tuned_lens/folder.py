"""tuned-lens's folders: params.pt and config.json, here or on the hub, as lenses of this library.

Upstream's translator i reads the INPUT of block i (0 is the embedding), has y = h + A h + b, and there is none for the last block's output:

    W_i = I + A_ref[i+1], b_i = b_ref[i+1] for i < L-1;  W_{L-1} = I, b_{L-1} = 0;  (A_ref[0], b_ref[0]) is kept as `lens.embedding`

Source: tuned_lens/nn/lenses.py and load_artifacts.py of AlignmentResearch/tuned-lens.
"""

from __future__ import annotations

import json
import os
import warnings
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

PARAMS, CONFIG = "params.pt", "config.json"
REPOSITORY, REPOSITORY_TYPE = "AlignmentResearch/tuned-lens", "space"
CONFIG_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class LensConfig:
    """config.json: upstream's TunedLensConfig, field by field.

    `unembed_hash` is the sha256 of NumPy's abbreviated print-out of the unembedding: it depends on NumPy's version and on quantization, so it is kept
    and never checked.
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
        """{name: shape} of the tensors in params.pt, if it has `count` of them as it should; else of the first few."""
        parts: dict[str, tuple[int, ...]] = {"weight": (self.d_model, self.d_model)} | ({"bias": (self.d_model,)} if self.bias else {})
        layers = min(self.num_hidden_layers, count // len(parts) + 1)
        return {f"{i}.{part}": shape for i in range(layers) for part, shape in parts.items()}


def is_tuned_lens(path: str | Path) -> bool:
    """Whether this is a folder of tuned-lens's, by the names of its files; or the params.pt of one."""
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
    """Read a lens of tuned-lens's, without torch and without running anything in its files.

    Args:
        path_or_id: a folder with params.pt and config.json; else the id of a lens on the Hugging Face hub, e.g. 'EleutherAI/pythia-160m-deduped'.
        repo_id: the hub's repository. None = $TUNED_LENS_REPO_ID, or AlignmentResearch/tuned-lens.
        repo_type: None = $TUNED_LENS_REPO_TYPE, or 'space'.
        revision: of the repository.
        subfolder: of the repository, in which the lenses' folders are.
        cache_dir: of downloads; None = the hub's own.

    Returns:
        a full lens, float32, its last translator the identity. `origin` has "model" and "revision" (of the model), and the unembedding's hash under
        "tuned_lens"; `embedding` the translator of the embedding, if that is not zero. Adding I rounds the diagonal of A to 6e-8; all else is exact.

    Raises:
        FileNotFoundError: if there is no such folder, and no such lens on the hub or no way to get it.
        ValueError: if the files are damaged, disagree, or are anything but a lens.
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
    lens.origin = {key: value for key, value in facts.items() if value is not None}
    if described.unembed_hash is not None:
        lens.origin["tuned_lens"] = {"unembed_hash": described.unembed_hash}
    return lens


def save(
    lens: TunedLens,
    folder: str | Path,
    model_name: str | None = None,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Write a lens as tuned-lens's params.pt and config.json, which upstream's TunedLens loads.

    Upstream has no translator for the last block's output: it is left out, with a warning if it is not the identity. The embedding's translator is
    `lens.embedding`, or zero.

    Args:
        lens: of any variant; low-rank and bias-only ones are written out whole.
        folder: is created where missing. Each file appears whole or not at all.
        model_name: the model's path or hub id. None = the one that the lens remembers.
        revision: of the model. None = the one that the lens remembers.
        dtype: of the tensors.

    Raises:
        ValueError: if the model's name is not known, or a number has no finite form in the type.
    """
    if dtype not in WRITABLE:
        raise InvalidValueError(f"dtype must be one of {', '.join(WRITABLE)}, got {dtype!r}.")
    remembered = lens.origin.get("model")
    model_name = model_name or remembered
    if not isinstance(model_name, str):
        raise InvalidValueError("config.json names the model that the lens was made for, and this lens does not remember it: give model_name.")
    own = model_name == remembered
    about: Any = lens.origin.get("tuned_lens", {})
    unembed_hash = about.get("unembed_hash") if own and isinstance(about, dict) else None
    revision = revision or (lens.origin.get("revision") if own else None)
    config = LensConfig(model_name, lens.hidden_dim, lens.num_layers, True, revision, unembed_hash)
    weight, bias = lens.dense(lens.num_layers - 1)
    if to_float(mx.any(weight != mx.eye(lens.hidden_dim))) or to_float(mx.any(bias != 0)):
        warnings.warn(
            f"tuned-lens has no translator for the last block's output: that of layer {lens.num_layers - 1}, which is not the identity, is left out.",
            UserWarning,
            stacklevel=2,
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PARAMS) as temporary:
        write_tensors(temporary, config.shapes(2 * lens.num_layers), _residuals(lens), dtype)
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")


def _residuals(lens: TunedLens) -> Iterator[mx.array]:
    """A_ref[0], b_ref[0], A_ref[1], ... of upstream."""
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
        warnings.warn(f"{file}: ignoring {', '.join(unknown[:4])}, which tuned-lens's configurations do not have.", UserWarning, stacklevel=3)
    return config


def _download(
    resource: str, repo_id: str | None, repo_type: str | None, revision: str, subfolder: str, cache_dir: str | Path | None
) -> tuple[Path, Path]:
    """Params.pt and config.json of a lens on the hub, from its cache if they are there."""
    repo_id = repo_id or os.environ.get("TUNED_LENS_REPO_ID") or REPOSITORY
    repo_type = repo_type or os.environ.get("TUNED_LENS_REPO_TYPE") or REPOSITORY_TYPE
    missing = f"No lens at {resource!r}: it is no folder with {PARAMS} and {CONFIG}"
    try:
        from huggingface_hub import hf_hub_download  # comes with mlx-lm; slow to import
    except ImportError as error:
        raise FileNotFoundError(f"{missing}, and the hub can't be asked without huggingface_hub: pip install huggingface_hub.") from error
    where = f"{subfolder}/{resource}".strip("/")
    try:
        params, config = (
            Path(hf_hub_download(repo_id, name, subfolder=where, repo_type=repo_type, revision=revision, cache_dir=cache_dir))
            for name in (PARAMS, CONFIG)
        )
    except Exception as error:  # of the network, the hub, its cache: each has types of its own
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{missing}, and {where!r} could not be had from the hub's {repo_type} {repo_id}: {reason}") from error
    return params, config
