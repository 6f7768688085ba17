"""Models that are too large for one machine: tensor parallelism through mlx-lm's own sharded loading.

Every process holds a part of each block's matrices and all of the rest: embedding, norms and head. The residual stream after a block is whole in
every process. All processes run every forward pass, on the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.models.blocks import find_layers, follow
from metalens.models.sharding import Processes, Sharding
from metalens.models.weights import hash_in_parts, named_arrays
from metalens.utils.errors import InvalidValueError

# Modules of mlx_lm.models whose models can be divided. The method `shard` of a class decides; this list is for the error message.
MODULES = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss"),
    *("iquestloopcoder", "kimi_k25", "kimi_k3", "llama", "longcat_flash", "longcat_flash_ngram", "minimax", "minimax_m3_vl", "ministral3"),
    *("mistral4", "muse_spark", "prism_hadamard_qwen35", "qwen2", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "solar_open", "step3p5"),
)

# Pieces of the files of weights that processes compare, and the bytes of each: a fixed time, however large the model is.
PIECES, PIECE_BYTES = 4096, 64


def load_sharded(path: str, processes: Processes) -> tuple[nn.Module, Any, Sharding]:
    """Load this process's part of a model, and the tokenizer. All processes must make the same call.

    Args:
        path: a folder in mlx-lm's format, or a hub id.
        processes: the processes, at least two.

    Returns:
        (model, tokenizer, how the model is divided)

    Raises:
        InvalidValueError: in every process, if the model can't be opened, if mlx-lm can't divide it or not among as many processes, or if the
            processes have different files or versions.
        UnavailableError: if another process has ended while this one was loading.
    """
    from mlx_lm.utils import load_model, sharded_load  # slow to import

    with processes.together():
        folder = _folder_of(path)
        whole, _ = load_model(folder, lazy=True, strict=False)
        trial, _ = load_model(folder, lazy=True, strict=False)
        _require_divisible(trial, whole, path, processes)
        del trial
        facts = _facts(folder)
    processes.require_same(facts)
    arrays = named_arrays(whole)
    del whole
    weights_hash = hash_in_parts(arrays, processes.rank, processes.size, processes.gather_json)
    # An error here ends this process, and so the others: mlx-lm waits for all at its end.
    with processes.reporting_loss():
        model, tokenizer = sharded_load(path, tensor_group=processes.group, tokenizer_config={"trust_remote_code": False})
    _make_whole_outside_blocks(model, processes)
    return model, tokenizer, Sharding(processes, weights_hash)


def require_tensor_parallelism(path: str) -> None:
    """Check that mlx-lm can divide a model. Only the configuration is read; a name that is no folder passes.

    Raises:
        InvalidValueError: if it can't; names the architectures that it can divide.
    """
    from mlx_lm.utils import _get_classes, load_config  # slow to import

    if not (Path(path) / "config.json").exists():
        return
    try:
        model_class, _ = _get_classes(load_config(Path(path)))
    except (ValueError, KeyError) as error:
        raise InvalidValueError(f"mlx-lm can't open the model {path!r}: {error}") from error
    if not hasattr(model_class, "shard"):
        name = model_class.__module__.rpartition(".")[2]
        raise InvalidValueError(
            f"mlx-lm can't divide the model {path!r} ({name}) among processes: it has no tensor parallelism for it. It has for {', '.join(MODULES)}. "
            "Without --shard-model (tensor_group=), every process loads the whole model."
        )


# ------------------------------------------------------------------ before the weights are read


def _folder_of(path: str) -> Path:
    """Return the folder of a model that mlx-lm can divide. Of a hub id, the weights are downloaded after the check."""
    from mlx_lm.utils import _download

    if Path(path).exists():
        require_tensor_parallelism(path)
        return Path(path)
    require_tensor_parallelism(str(_download(path, allow_patterns=["*.json"])))
    return Path(_download(path))


def _require_divisible(trial: nn.Module, whole: nn.Module, path: str, processes: Processes) -> None:
    """Divide a model whose arrays are not loaded, and check the result. mlx-lm itself rounds the number of heads down.

    Raises:
        InvalidValueError: if the model can't be divided among as many processes.
    """
    n = processes.size
    advice = f"Start another number of processes: one that divides {_heads(whole)}."
    try:
        trial.shard(processes.group)
    except Exception as error:  # mlx-lm's own checks raise what they like
        reason = str(error).strip().partition("\n")[0]
        raise InvalidValueError(f"mlx-lm can't divide the model {path!r} among {n} processes: {reason} ({type(error).__name__}). {advice}") from error
    before = dict(_head_counts(whole))
    for name, after in _head_counts(trial):
        count = before[name]
        repeated = after == 1 and count < n and n % count == 0  # heads of keys and values that mlx-lm copies
        if after not in (count, count / n) and not repeated:
            raise InvalidValueError(f"The model {path!r} can't be divided among {n} processes: {name} is {count}. {advice}")


def _head_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the numbers of attention heads that the modules of the blocks hold, by the dotted name of the attribute."""
    root, layers = find_layers(model)
    for i, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if "heads" in name and type(value) is int:
                    yield ".".join(filter(None, (root, str(i), path, name))), value


def _heads(model: nn.Module) -> str:
    """Return the numbers of heads of a model, for an error message."""
    counts = sorted({count for _, count in _head_counts(model)})
    return f"its numbers of heads, {' and '.join(map(str, counts))}" if counts else "the sizes of its matrices"


def _facts(folder: Path) -> dict[str, Any]:
    """Return what all processes must have in common: configuration, files of weights, versions."""
    files = sorted(folder.glob("model*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    facts = {f"version of {name}": version(name) for name in ("metalens", "mlx", "mlx-lm")}
    facts["model's config.json"] = _short(hashlib.sha256((folder / "config.json").read_bytes()))
    return facts | {f"model's file {file.name}": _fingerprint(file, total) for file in files}


def _fingerprint(file: Path, total: int) -> str:
    """Return a hash of a file's size and of pieces of it at equal distances, of which the model's `total` bytes have PIECES."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        digest.update(content.read(PIECE_BYTES))
        for start in range(0, size, max(total // PIECES, PIECE_BYTES)):
            content.seek(start)
            digest.update(content.read(PIECE_BYTES))
    return _short(digest)


def _short(digest: Any) -> str:
    return str(digest.hexdigest())[:16]


# ------------------------------------------------------------------ the head


def _make_whole_outside_blocks(model: nn.Module, processes: Processes) -> None:
    """Give every process all of a head that mlx-lm has divided. Every process trains layers of its own, and each needs the whole vocabulary."""
    _, layers = find_layers(model)
    inside = {id(module) for layer in layers for _, module in layer.named_modules()}
    divided = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, divided) and id(module) not in inside]
    for path, module in found:
        parent, _, name = path.rpartition(".")
        owner = follow(model, parent) if parent else model
        setattr(owner, name, _whole_linear(module, processes))
        if hasattr(owner, "sharding_group"):
            owner.sharding_group = None  # else it would gather logits that are whole


def _whole_linear(module: nn.Module, processes: Processes) -> nn.Module:
    """Return the linear layer whose rows the processes hold."""
    if isinstance(module, nn.QuantizedAllToShardedLinear):
        whole: nn.Module = nn.QuantizedLinear(module.group_size, 1, False, module.group_size, module.bits, module.mode)
    else:
        whole = nn.Linear(1, 1, bias=False)
    for name, array in module.parameters().items():
        if isinstance(array, mx.array):
            whole[name] = processes.all_gather(array)
    return whole.eval()
