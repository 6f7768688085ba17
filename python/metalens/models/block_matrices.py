"""The matrices of a block that write into the residual stream, and the value-output circuit of an attention head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.models.blocks import follow
from metalens.models.fused_values import value_rows
from metalens.models.submodules import submodule_name, submodules
from metalens.models.unembed import merged, norm_of
from metalens.ops import Weight
from metalens.ops.weight import unpacked_columns, unpacked_rows
from metalens.utils.errors import InvalidValueError

# {kind of sublayer: last part of the name of its output matrix in mlx-lm's models}
OUTPUT_NAMES = {
    "attention": ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj"),
    "mlp": ("down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h", "fc_out", "ff_out", "out_proj", "output_linear"),
}
VALUE_NAMES = ("v_proj", "wv")
HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
KEY_VALUE_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")
INPUT_NORMS = ("input_layernorm", "attention_norm", "ln_1", "norm1", "operator_norm")


class OutputMatrix(NamedTuple):
    """A matrix W [D, I] that writes into the residual stream: column i is what its input i adds.

    Attributes:
        path: dotted path inside the block, with "[e]" after it for expert e.
        weight: the matrix, packed as it is stored.
    """

    path: str
    weight: Weight


def output_matrices(block: nn.Module, which: str, hidden_size: int) -> list[OutputMatrix]:
    """Find the output matrices of a block; of a mixture of experts one for each expert.

    Args:
        block: the block.
        which: 'mlp', 'attention', or the dotted path of a matrix inside the block.
        hidden_size: D.

    Raises:
        InvalidValueError: if there is no such matrix, or it does not write D numbers. The error names those that do.
    """
    if which in OUTPUT_NAMES:
        found = [(path, module) for path, module in _matrices(block, hidden_size) if _kind(path) == which]
    else:
        named = submodule_name(block, which)
        found = [(path, module) for path, module in _matrices(block, hidden_size) if path == named]
    if not found:
        known = ", ".join(path for path, _ in _matrices(block, hidden_size)) or "none"
        raise InvalidValueError(
            f"The block has no matrix {which!r:.80} that writes {hidden_size} numbers into the residual stream. "
            f"Its matrices with {hidden_size} outputs are: {known}. Name one of them, 'mlp' or 'attention'."
        )
    return [matrix for path, module in found for matrix in _experts(path, module)]


def _matrices(block: nn.Module, hidden_size: int) -> list[tuple[str, nn.Module]]:
    """Return the modules whose matrix has D outputs, by path. An adapter stands for the layer inside it."""
    modules = submodules(block)
    adapters = tuple(f"{path}." for path, module in modules.items() if hasattr(module, "fuse"))
    return [
        (path, module)
        for path, module in ((path, merged(module)) for path, module in modules.items() if not path.startswith(adapters))
        if "weight" in module and module["weight"].ndim in (2, 3) and module["weight"].shape[-2] == hidden_size
    ]


def _kind(path: str) -> str:
    """Return 'mlp' or 'attention' for the path of an output matrix, "" for that of another one."""
    *parents, name = path.split(".")
    kind = "attention" if any("attn" in part or "attention" in part for part in parents) else "mlp"
    return kind if name in OUTPUT_NAMES[kind] else ""


def _experts(path: str, module: nn.Module) -> Iterator[OutputMatrix]:
    """Yield the matrix of a module, or those of its experts [E, D, I]."""
    weight = Weight.from_layer(module)
    if weight.values.ndim == 2:
        yield OutputMatrix(path, weight)
        return
    for e in range(weight.values.shape[0]):
        scales, biases = (None if a is None else a[e] for a in (weight.scales, weight.biases))
        yield OutputMatrix(f"{path}[{e}]", replace(weight, values=weight.values[e], scales=scales, biases=biases))


class HeadCircuit(NamedTuple):
    """The matrix W_O W_V [D, D] of an attention head, which maps what it attends to onto what it writes, as two thin factors.

    Attributes:
        output: [D, d] columns of the output matrix that belong to the head, float32.
        value: [d, D] rows of the value matrix, times the gain of the norm before them, float32.
    """

    output: np.ndarray
    value: np.ndarray

    def directions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the singular values [d], largest first, and the directions that the head writes [d, D]: the left singular vectors, as rows.

        The sign of a direction is arbitrary.
        """
        q, r = np.linalg.qr(self.output.astype(np.float64))
        _, s = np.linalg.qr(self.value.astype(np.float64).T)
        u, sizes, _ = np.linalg.svd(r @ s.T)
        return sizes, (q @ u).T


def head_circuit(block: nn.Module, head: int, hidden_size: int) -> HeadCircuit:
    """Return the value-output circuit of an attention head. Only its rows and columns are unpacked.

    Args:
        block: the block.
        head: number of the head, 0 or more.
        hidden_size: D.

    Raises:
        InvalidValueError: if the block has no attention whose values are known, in a matrix of their own or in a fused one, or no such head.
    """
    (matrix,) = output_matrices(block, "attention", hidden_size)[:1]
    attention: Any = follow(block, matrix.path.rpartition(".")[0])
    module = next((value for name in VALUE_NAMES if isinstance(value := getattr(attention, name, None), nn.Module)), None)
    heads = _number(attention, HEADS)
    if heads is None:
        raise InvalidValueError(_no_circuits(matrix.path, "it does not tell its number of heads"))
    if not 0 <= head < heads:
        raise InvalidValueError(f"The attention has heads 0 to {heads - 1}, not {head}.")
    width = matrix.weight.shape[1] // heads
    if module is not None:
        value = Weight.from_layer(merged(module))
        group = head // (heads // (_number(attention, KEY_VALUE_HEADS) or heads))
        of_head = np.arange(group * width, (group + 1) * width)
    else:
        try:
            value, all_rows = value_rows(attention, follow(block, matrix.path), hidden_size)
        except InvalidValueError as error:
            raise InvalidValueError(_no_circuits(matrix.path, str(error))) from error.__cause__
        of_head = all_rows[head * width : (head + 1) * width]
        if len(np.unique(of_head)) < width:
            raise InvalidValueError(_no_circuits(matrix.path, "its values are not rows of one matrix"))
    output = unpacked_columns(matrix.weight, head * width, (head + 1) * width)
    rows = unpacked_rows(value, mx.array(of_head.astype(np.int32)))
    gain = _input_gain(block)
    return HeadCircuit(np.array(output).T, np.array(rows if gain is None else rows * gain.astype(mx.float32)))


def _no_circuits(path: str, reason: str) -> str:
    attention = path.rpartition(".")[0]
    return f"The value-output circuits of the attention at {attention!r} can't be read: {reason}. Read its output matrix: 'attention'."


def number_of_heads(block: nn.Module, hidden_size: int) -> int:
    """Return the number of attention heads of a block (InvalidValueError if its attention does not tell)."""
    matrix = output_matrices(block, "attention", hidden_size)[0]
    heads = _number(follow(block, matrix.path.rpartition(".")[0]), HEADS)
    if heads is None:
        raise InvalidValueError(f"The attention at {matrix.path.rpartition('.')[0]!r} does not tell its number of heads.")
    return heads


def _number(module: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)


def _input_gain(block: nn.Module) -> mx.array | None:
    """Return the gain of the norm before the attention, None if none is found under the usual names."""
    module = next((value for name in INPUT_NORMS if isinstance(value := getattr(block, name, None), nn.Module)), None)
    return None if module is None else norm_of(module).weight
