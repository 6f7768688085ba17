"""The files of a lens: `<name>.npz` holds the arrays, `<name>.json` says what they are.

    x.npz    translators_<i>_weight [D, D] and translators_<i>_bias [D] of every layer i, float32. A variant stores the arrays that
             `lenses.translators.VARIANTS` lists. The arrays of the embedding's translator, translators_embedding_weight and so on, are
             optional. Before version 3 they were embedding_weight, which is W - I, and embedding_bias.
    x.json   num_layers and hidden_dim. On demand also format_version, variant, rank, layers, and the provenance under the key "origin".
             "checksums" has the SHA-256 of x.npz, which binds the two files, and that of the other keys.

mlxterp writes and reads the pair of a full lens. This module knows files and arrays; `lenses.lens` builds the lens.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.translators import VARIANTS, shape_of
from metalens.models.layers import EMBEDDING, Layer
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write, sha256_of, sha256_of_values
from metalens.utils.outputs import Output
from metalens.utils.warn import warn_caller

# Version 1 is a full lens: mlxterp and every metalens read it, whatever else the file says. Version 2 knows the variants, version 3 a translator of
# the embedding, which mlxterp does not read.
FORMAT_VERSION = 3
# The largest number of layers that a file may claim without having arrays for them.
MAX_LAYERS = 10_000
# The provenance keeps its old key, so that older versions read it.
PROVENANCE = "origin"
# {"weights": SHA-256 of the .npz file, "description": that of the other keys}. Older versions and mlxterp ignore it.
CHECKSUMS = "checksums"
# The largest .json file that is read, in bytes.
LARGEST_CONFIG = 1 << 24
# {key of version 0.1.0: key now}, in the provenance
OLD_KEYS = {"quantisation": "quantization"}


@dataclass(frozen=True)
class LensDescription:
    """What the .json file says about a lens.

    Attributes:
        num_layers: L, blocks of the model.
        hidden_dim: D, width of its residual stream.
        variant: a key of VARIANTS.
        rank: rank of low-rank translators; None for the other variants.
        layers: blocks that have a translator; None = all.
        provenance: the model, the training and the text of the lens, as JSON.
    """

    num_layers: int
    hidden_dim: int
    variant: str = "full"
    rank: int | None = None
    layers: list[int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def translated_layers(self) -> list[int]:
        """Return the blocks that have a translator."""
        return list(range(self.num_layers)) if self.layers is None else self.layers

    @property
    def is_full(self) -> bool:
        """Return whether every block has a translator y = W h + b with the whole W."""
        return self.variant == "full" and len(self.translated_layers) == self.num_layers


@dataclass(frozen=True)
class LensData:
    """A lens as its files hold it.

    Attributes:
        description: contents of the .json file.
        translators: {layer: {parameter: array}}, as `lenses.translators.parameters_of` returns them.
        embedding: parameters of the embedding's translator, like those of a layer. None = it has none.
    """

    description: LensDescription
    translators: Mapping[int, Mapping[str, mx.array]]
    embedding: Mapping[str, mx.array] | None = None


def lens_files(path: str | Path) -> tuple[Path, Path]:
    """Return the (.npz, .json) pair that a lens path names. Only these two suffixes are removed: 'Llama-3.2-1B' keeps its dot.

    Raises:
        InvalidValueError: if the path has no file name.
    """
    path = Path(path).expanduser()
    stem = path.name[: -len(path.suffix)] if path.suffix in {".npz", ".json"} else path.name
    if stem in {"", ".", ".."}:
        raise InvalidValueError(f"{str(path)!r} names no lens file. Give a file name, such as 'my-lens'.")
    return path.with_name(stem + ".npz"), path.with_name(stem + ".json")


def lens_outputs(path: str | Path) -> list[Output]:
    """Return the two files of a lens that is going to be written."""
    weights, config = lens_files(path)
    return [Output(weights, "the weights of a lens", is_lens_archive), Output(config, "the description of a lens", is_lens_description)]


def write_lens(path: str | Path, lens: LensData) -> None:
    """Write both files of a lens. Create missing folders. Each file appears whole or not at all.

    The .npz file is moved into place just before the .json file. After a crash between the two, the checksum in the old
    .json file says that they do not belong together.

    Raises:
        InvalidValueError: if an array holds NaN or infinity, or if JSON cannot hold the provenance; nothing is written then.
        OSError: if a file cannot be written.
    """
    weights, config = lens_files(path)
    about = _config_of(lens)
    json.dumps(about, allow_nan=False, default=_refuse)
    arrays = {array_name(layer, part): _finite(array, f"layer {layer}") for layer, parts in lens.translators.items() for part, array in parts.items()}
    if lens.embedding is not None:
        arrays |= {array_name(EMBEDDING, part): _finite(array, "the embedding") for part, array in lens.embedding.items()}
    weights.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(config) as description, contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_write(weights))
        stored: dict[str, Any] = arrays
        np.savez(temporary, allow_pickle=False, **stored)
        checksums = {"weights": sha256_of(temporary), "description": _sha256_of_description(about)}
        description.write_text(json.dumps(about | {CHECKSUMS: checksums}, indent=2, allow_nan=False, default=_refuse) + "\n", encoding="utf-8")
        stack.close()  # moves the .npz file; the .json file follows


def _finite(array: mx.array, what: str) -> np.ndarray:
    """Return an array in float32 for NumPy, if all its numbers are finite."""
    found = np.array(array.astype(mx.float32))
    if not np.isfinite(found).all():
        raise InvalidValueError(
            f"The translator of {what} holds NaN or infinity: its training diverged. Nothing is written, and a lens of this name stays as it was. "
            "Train it again with a lower learning rate."
        )
    return found


def _sha256_of_description(about: Mapping[str, Any]) -> str:
    """Return the hash of a .json file's values, the checksums left out."""
    return sha256_of_values({key: value for key, value in about.items() if key != CHECKSUMS}, _refuse)


def read_lens(path: str | Path) -> LensData:
    """Read both files of a lens that metalens or mlxterp wrote.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        InvalidValueError: if a file is damaged or is not a lens, if the files disagree or do not belong together, or if
            an array holds NaN or infinity.
    """
    weights, config = lens_files(path)
    for file in (weights, config):
        if not file.is_file():
            raise FileNotFoundError(f"No lens at {path}: {file} is missing. A lens is the pair {weights.name} and {config.name}.")
    described, checksum = _read_config(config)
    expected = f"a lens of {described.num_layers} layers, as {config.name} says"
    arrays = read_arrays(weights, lambda stored: _expected_arrays(described, stored), expected)
    if checksum is not None and sha256_of(weights) != checksum:
        raise InvalidValueError(
            f"{weights} and {config} do not belong together: {config.name} describes other weights (their SHA-256 differs). "
            "One of them was copied, damaged, or written by a run that was killed before it wrote the other. "
            "Copy both files again, or train the lens again; with --resume, a run that has finished only writes them."
        )
    translators = {i: {part: arrays[array_name(i, part)] for part in VARIANTS[described.variant]} for i in described.translated_layers}
    embedding = {part: arrays[name] for part in VARIANTS[described.variant] if (name := array_name(EMBEDDING, part)) in arrays}
    if _OLD_EMBEDDING[0] in arrays:
        embedding = {"weight": mx.eye(described.hidden_dim) + arrays[_OLD_EMBEDDING[0]], "bias": arrays[_OLD_EMBEDDING[1]]}
    return LensData(described, translators, embedding or None)


# ------------------------------------------------------------------ the .json file


def _config_of(lens: LensData) -> dict[str, Any]:
    described = lens.description
    config: dict[str, Any] = {"num_layers": described.num_layers, "hidden_dim": described.hidden_dim}
    if not described.is_full:
        config |= {"format_version": 2, "variant": described.variant, "rank": described.rank, "layers": described.translated_layers}
    elif described.provenance:
        config |= {"format_version": 1}
    if lens.embedding is not None:
        config |= {"format_version": 3}
    return config | ({PROVENANCE: described.provenance} if described.provenance else {})


def _refuse(value: Any) -> Any:
    raise InvalidValueError(f"The lens's provenance holds {value!r}, which JSON has no form for. Put text, numbers, lists and dicts of them there.")


def _read_config(file: Path) -> tuple[LensDescription, str | None]:
    """Return the contents of a .json file, and the SHA-256 of the weights that it describes, if it says so.

    Warn if the contents have changed since they were written.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise InvalidValueError(f"it has {file.stat().st_size} bytes")
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        num_layers, hidden_dim = config["num_layers"], config["hidden_dim"]
        written = config.get("format_version", 1)
        variant, rank, layers, provenance = config.get("variant", "full"), config.get("rank"), config.get("layers"), config.get(PROVENANCE, {})
        checksums = config.get(CHECKSUMS, {})
        if type(num_layers) is not int or type(hidden_dim) is not int:
            raise InvalidValueError(f"num_layers {num_layers!r:.50} and hidden_dim {hidden_dim!r:.50} are not both whole numbers")
        known = {name: checksums.get(name) for name in ("weights", "description")}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error) if isinstance(error, InvalidValueError) else repr(error)
        raise InvalidValueError(f"{file} does not describe a lens: expected JSON with num_layers and hidden_dim ({reason:.200}).") from error
    if type(written) is not int or not 1 <= written <= FORMAT_VERSION:
        raise InvalidValueError(f"{file} has format_version {written!r}; this metalens reads up to {FORMAT_VERSION}. Read it with a newer metalens.")
    if (
        not isinstance(variant, str)
        or variant not in VARIANTS
        or (type(rank) is int) != (variant == "low-rank")
        or not (layers is None or (isinstance(layers, list) and all(type(i) is int and 0 <= i < num_layers <= MAX_LAYERS for i in layers)))
        or not isinstance(provenance, dict)
    ):
        raise InvalidValueError(
            f"{file} does not describe a lens: expected a variant of {', '.join(VARIANTS)}, a rank for low-rank only, layers as a list of different "
            f"numbers, and {PROVENANCE} as an object; "
            f"found variant {variant!r}, rank {rank!r}, layers {layers!r:.200}, {PROVENANCE} {provenance!r:.200}."
        )
    if known["description"] is not None and known["description"] != _sha256_of_description(config):
        warn_caller(f"{file} has changed since it was written: it was edited or is damaged. What it says about the lens may be wrong.")
    provenance = {OLD_KEYS.get(key, key): value for key, value in provenance.items()}
    return LensDescription(num_layers, hidden_dim, variant, rank, layers, provenance), known["weights"]


def is_lens_description(file: Path) -> bool:
    """Return whether a .json file describes a lens, whoever wrote it."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= LARGEST_CONFIG else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and type(found.get("num_layers")) is int and type(found.get("hidden_dim")) is int


def is_lens_archive(file: Path) -> bool:
    """Return whether an .npz file has the names of a lens's arrays, and no others."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
    except (ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    return bool(found) and all(_ARRAY.fullmatch(name) for name in found)


# ------------------------------------------------------------------ the .npz file


def array_name(layer: Layer, parameter: str) -> str:
    """Return the name of a translator's parameter in the .npz file."""
    return f"translators_{layer}_{parameter}"


_ARRAY = re.compile(r"translators_(\d+|embedding)_(weight|down|up|bias)|embedding_(weight|bias)")
_OLD_EMBEDDING = ("embedding_weight", "embedding_bias")


def _expected_arrays(described: LensDescription, stored: set[str]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a lens's arrays. Stop one layer after the number of stored arrays: a damaged file may claim any number of layers."""
    d = described.hidden_dim
    layers = range(described.num_layers) if described.layers is None else described.layers
    expected = {array_name(i, part): shape_of(part, d, described.rank) for i in layers[: len(stored) + 1] for part in VARIANTS[described.variant]}
    of_embedding = {array_name(EMBEDDING, part): shape_of(part, d, described.rank) for part in VARIANTS[described.variant]}
    if set(_OLD_EMBEDDING) <= stored:
        of_embedding = {_OLD_EMBEDDING[0]: (d, d), _OLD_EMBEDDING[1]: (d,)}
    return expected | of_embedding if of_embedding.keys() & stored else expected


class WrongArraysError(InvalidValueError):
    """The archive is whole, but does not hold what its description says."""


def read_arrays(file: Path, expected: Callable[[set[str]], Mapping[str, tuple[int, ...]]], what: str) -> dict[str, mx.array]:
    """Read the arrays of an .npz file as float32.

    Args:
        file: the archive. Pickled objects in it are not read.
        expected: a function from the stored names to {name: shape} of the required arrays. More or fewer arrays are an
            error.
        what: the expected contents, for error messages: 'a lens of 2 layers, as x.json says'.

    Raises:
        InvalidValueError: if the file is damaged, or holds other arrays, or NaN or infinity.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            stored = set(archive.files)
            if len(stored) < len(archive.files):
                raise WrongArraysError(f"{file} is not {what}: it holds an array twice.")
            shapes = expected(stored)
            for names, verb in ((set(shapes) - stored, "it holds no"), (stored - set(shapes), "it also holds")):
                if names:
                    raise WrongArraysError(f"{file} is not {what}: {verb} {', '.join(sorted(names)[:4])}.")
            return {name: mx.array(_checked(archive[name], shape, f"{file}: {name}", what)) for name, shape in shapes.items()}
    except WrongArraysError:
        raise
    except Exception as error:  # a dozen types, depending on the damaged byte
        raise InvalidValueError(f"{file} is damaged or no .npz archive ({archive_fault(error)}). Copy it again, or train the lens again.") from error


def archive_fault(error: Exception) -> str:
    """Return why NumPy can't read an archive, in one phrase.

    NumPy takes whatever is no archive for a pickle, and says how to load that unsafely.
    """
    if "pickle" not in str(error):
        return str(error)
    return "it holds Python objects, which are never loaded" if "Object arrays" in str(error) else "it does not begin as an archive does"


def _checked(array: np.ndarray, shape: tuple[int, ...], name: str, what: str) -> np.ndarray:
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise WrongArraysError(f"{name} has shape {array.shape} and type {array.dtype}; {what}, would have numbers of shape {shape}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise WrongArraysError(f"{name} holds NaN or infinity. Its training diverged; train it again.")
    return array
