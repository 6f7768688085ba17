"""Write the model of a GGUF file as a folder that mlx-lm opens."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from metalens.models.gguf.architectures import ROTARY_TENSORS, Architecture, architecture_of
from metalens.models.gguf.formats import AFFINE, DENSE, GROUP, Weight, converted
from metalens.models.gguf.header import GGUFFile, Tensor, block_sizes, read_gguf
from metalens.models.gguf.tokenizer import special_id, write_tokenizer
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import naming, remove_left_behind, sync_folder, temporary_folder

Dtype = Literal["float32", "float16", "bfloat16"]

# What a conversion writes.
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class FormatReport:
    """What became of the tensors of one format.

    Attributes:
        kind: the format in the file, for example 'Q6_K'.
        tensors: number of tensors.
        bits: bits of a number now. 0 = dense.
        error: largest difference from the file's numbers, as a fraction of the largest number of its tensor.
    """

    kind: str
    tensors: int
    bits: int
    error: float

    @property
    def requantized(self) -> bool:
        """Return whether the codes are not the file's own."""
        return self.kind not in (*AFFINE, *DENSE)

    def __str__(self) -> str:
        now = f"{self.bits} bits in groups of {GROUP}" if self.bits else "dense"
        how = "requantized to " if self.requantized else ""
        error = "exact" if self.error == 0 else f"largest error {self.error:.1e} of the largest weight"
        return f"{self.tensors} x {self.kind}: {how}{now}, {error}"


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        folder: the folder.
        architecture: the name of the architecture in the file.
        dtype: type of dense numbers, scales and biases.
        formats: what became of the tensors, one entry for each format.
        remarks: lines for the user.
    """

    folder: Path
    architecture: str
    dtype: str
    formats: tuple[FormatReport, ...]
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [f"{self.architecture}, {self.dtype}", *map(str, self.formats), *self.remarks]


def convert_gguf(source: str | Path, target: str | Path, dtype: Dtype | None = None, *, force: bool = False) -> Conversion:
    """Write the model of a GGUF file as a folder in mlx-lm's format: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q4_K keep their codes. Other quantized formats are quantized again, to 8 bits in groups of 32. The folder
    appears when it is complete.

    Args:
        source: the GGUF file.
        target: the folder to write. It must not exist, or be empty.
        dtype: type of dense numbers, scales and biases. float32 is exact. None = the file's own type if its matrices are not quantized, else
            float16, or bfloat16 for architectures whose hidden states are too large for float16.
        force: replace a folder that has these four files and nothing else.

    Returns:
        a report.

    Raises:
        OSError: if there is no such file, or if the folder exists.
        InvalidValueError: if the file is damaged, or if its architecture, its tokenizer or one of its formats is unknown. The error names it.
        MissingPackageError: if the `gguf` package is not installed.
    """
    block_sizes()  # says first if the package is missing
    source, target = Path(source), Path(target).expanduser()
    _require_replaceable(target, force)
    file = read_gguf(source)
    architecture = architecture_of(file)
    name = dtype or _default_dtype(file, architecture)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as folder, naming(target):
        formats, remarks = _write(file, architecture, folder, name)
        _check(source, folder)
        folder.chmod(0o755)  # folders of mkdtemp are private
        publish(folder, target, replace=force)
    return Conversion(target, file.metadata.architecture, name, tuple(formats), tuple(remarks))


def _require_replaceable(target: Path, force: bool) -> None:
    """Check that there is nothing at the place of a folder, or with `force` only a folder of the same files (FileExistsError)."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or target.is_symlink():
        raise FileExistsError(f"{target} exists and is not a folder. Choose the name of a folder that does not exist.")
    others = sorted({entry.name for entry in target.iterdir()} - set(FILES))
    if others:
        raise FileExistsError(
            f"{target} exists and has {others[0]!r}, which a conversion does not write, so it is not replaced. Choose the name of a folder that does "
            "not exist, or delete it first."
        )
    if not force:
        raise FileExistsError(f"{target} exists. Choose the name of a folder that does not exist, or replace it with --force (force=True in Python).")


def publish(folder: Path, target: Path, *, replace: bool = False) -> None:
    """Move a complete folder to its name. After a power failure too, the name has either all of its files or none.

    Args:
        folder: the complete folder, beside `target`.
        target: its name.
        replace: replace a folder of this name. Between two moves there is none, and the old one has a name that begins with a dot.
    """
    for path in folder.iterdir():
        with path.open("rb+") as written:
            os.fsync(written.fileno())
    sync_folder(folder)
    former = target.with_name(f"{target.name}.old")
    with contextlib.ExitStack() as stack:
        if replace and target.exists():
            old = stack.enter_context(temporary_folder(former))
            target.replace(old)
            try:
                folder.replace(target)
            except OSError:
                old.replace(target)
                raise
        else:
            folder.replace(target)
        sync_folder(target.parent)
    remove_left_behind(former)  # only now: the folder of a process that was killed between the two moves was the only one


def _default_dtype(file: GGUFFile, architecture: Architecture) -> Dtype:
    matrices = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if "BF16" in matrices:
        return "bfloat16"
    if matrices <= {"F32", "F64"}:
        return "float32"
    return "bfloat16" if architecture.wide else "float16"


def _write(file: GGUFFile, architecture: Architecture, folder: Path, dtype: Dtype) -> tuple[list[FormatReport], list[str]]:
    """Write the four files. Return the report of each format, and remarks."""
    embedding = _check_sizes(file)
    config = architecture.config(file)
    remarks = write_tokenizer(file.metadata, folder, int(config["max_position_embeddings"]))
    weights: dict[str, Weight] = {}
    kinds: dict[str, str] = {}
    for tensor in file.tensors.values():
        if tensor.name in ROTARY_TENSORS or tensor.name.endswith(".attn_rot_embd"):
            continue
        path = architecture.path_of(tensor.name)
        if path is None and tensor.name == "output.weight":
            remarks.append("The file has a head of its own, and mlx-lm's model uses the embedding as its head: the embedding is taken.")
            continue
        if path is None:
            raise InvalidValueError(f"{file.path} has a tensor {tensor.name!r}, which metalens does not know for {file.metadata.architecture}.")
        weights[path] = _weight(file, architecture, tensor, getattr(mx, dtype))
        kinds[path] = tensor.kind
    arrays = {f"{path.rpartition('.')[0]}.{part}": a for path, w in weights.items() for part, a in _parts(path, w)}
    if config.get("attention_bias") or config.get("mlp_bias"):
        _add_missing_biases(arrays, config, int(config["num_hidden_layers"]))
    try:
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    except RuntimeError as error:  # MLX's error for a full disk
        raise OSError(f"model.safetensors: {error}. Is the disk full?") from error
    config |= {"model_type": architecture.model_type, "architectures": [architecture.classname], "vocab_size": embedding.shape[0]}
    config |= {"torch_dtype": dtype, **_special_ids(file), **_quantization(weights)}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    groups: dict[tuple[str, int], list[float]] = {}
    for path, weight in weights.items():
        groups.setdefault((kinds[path], weight.bits), []).append(weight.error)
    return [FormatReport(kind, len(errors), bits, max(errors)) for (kind, bits), errors in groups.items()], remarks


def _check_sizes(file: GGUFFile) -> Tensor:
    """Check the sizes that the metadata says against the tensors, before a model of these sizes is made. Return the embedding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidValueError(f"{file.path} is damaged: it has no matrix 'token_embd.weight'. Download it again.")
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    for key, found in (("block_count", len(blocks)), ("embedding_length", embedding.shape[1])):
        if (said := file.metadata.setting(key, int)) != found:
            raise InvalidValueError(f"{file.path} is damaged: it says {key} {said}, and its tensors have {found}. Download it again.")
    return embedding


def _weight(file: GGUFFile, architecture: Architecture, tensor: Tensor, dtype: mx.Dtype) -> Weight:
    norm = tensor.name.endswith("norm.weight")
    rows = architecture.rows(file.metadata, tensor.name, tensor.shape[0])
    weight = converted(tensor, dtype, rows, architecture.norm_offset if norm else 0.0)
    if not math.isfinite(weight.error):
        raise InvalidValueError(f"{file.path}: {tensor.name} has numbers that {dtype} can't hold, or that are not finite. Try dtype float32.")
    return weight


def _parts(path: str, weight: Weight) -> list[tuple[str, mx.array]]:
    """Return the arrays of a weight with the last parts of their names. A bias is one dense array."""
    return [("bias", weight.arrays["weight"])] if path.endswith(".bias") else list(weight.arrays.items())


def _add_missing_biases(arrays: dict[str, mx.array], config: dict[str, Any], layers: int) -> None:
    """Add zeros for the biases that mlx-lm's model has and the file does not."""
    for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        if config["attention_bias" if part == "self_attn" else "mlp_bias"]:
            for i in range(layers):
                for name in names:
                    stem = f"model.layers.{i}.{part}.{name}_proj"
                    if f"{stem}.weight" in arrays and f"{stem}.bias" not in arrays:
                        arrays[f"{stem}.bias"] = mx.zeros(arrays[f"{stem}.weight"].shape[0], arrays[f"model.layers.{i}.input_layernorm.weight"].dtype)


def _special_ids(file: GGUFFile) -> dict[str, Any]:
    """Return the ids of the tokens that begin and end a text. A chat model ends its turn with another token than its text."""
    found: dict[str, Any] = {}
    if (bos := special_id(file.metadata, "bos")) is not None:
        found["bos_token_id"] = bos
    ends = [i for name in ("eos", "eot") if (i := special_id(file.metadata, name)) is not None]
    if ends:
        distinct = list(dict.fromkeys(ends))
        found["eos_token_id"] = distinct if len(distinct) > 1 else distinct[0]
    return found


def _quantization(weights: dict[str, Weight]) -> dict[str, Any]:
    """Return the two entries of config.json: the commonest format for all, and the others by path."""
    bits = {path.rpartition(".")[0]: weight.bits for path, weight in weights.items() if weight.bits}
    if not bits:
        return {}
    commonest = Counter(bits.values()).most_common(1)[0][0]
    entry: dict[str, Any] = {"group_size": GROUP, "bits": commonest}
    entry |= {path: {"group_size": GROUP, "bits": count} for path, count in bits.items() if count != commonest}
    return {"quantization": entry, "quantization_config": entry}


def _check(source: Path, folder: Path) -> None:
    """Check that mlx-lm's model has exactly these tensors, in these shapes. Their numbers are not read."""
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(folder, lazy=True)
        del model
    except Exception as error:  # mlx-lm raises errors of many types for a file that does not fit
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValueError(f"{source} does not fit mlx-lm's model of its architecture ({reason}). The file may be damaged.") from error
