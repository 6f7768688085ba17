"""Record and edit the outputs of the modules inside the blocks: attention, feed-forward layers, projections."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.models.observing import replaced_methods, snapshot
from metalens.utils.errors import InvalidValueError

# Other names of parts of a block, for models that name them otherwise: {name: names in mlx-lm's models}.
ALIASES = {
    "attn": ("self_attn", "attention", "self_attention", "linear_attn"),
    "self_attn": ("attn", "attention", "self_attention", "linear_attn"),
    "mlp": ("feed_forward", "ffn", "block_sparse_moe"),
}


def submodules(block: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a block by their names in it, such as 'self_attn' and 'self_attn.q_proj'. A module with two names has the first."""
    found: dict[str, nn.Module] = {}
    known: set[int] = set()
    for name, module in sorted(block.named_modules(), key=lambda pair: (pair[0].count("."), pair[0])):
        if name and id(module) not in known:
            found[name] = module
            known.add(id(module))
    return found


def submodule_name(block: nn.Module, name: str) -> str | None:
    """Return the name of a module in a block: the name itself, or that of the part which it is an alias of; None if there is none."""
    names = submodules(block)
    first, _, rest = name.partition(".")
    for candidate in (first, *ALIASES.get(first, ())):
        whole = f"{candidate}.{rest}" if rest else candidate
        if whole in names:
            return whole
    return None


def named_place(key: str | int, layers: Sequence[nn.Module]) -> tuple[int, str]:
    """Return the block that a name means, and the name of the module in it; "" = the block itself.

    Args:
        key: the index of a block, or a name that contains layers.<i>, h.<i> or blocks.<i>, and after it the name of a module in the block, such as
            'layers.4.mlp'.
        layers: the blocks.

    Raises:
        InvalidValueError: if there is no such block, or no such module in it.
    """
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.(.+))?$", key) if isinstance(key, str) else None
    index = key if isinstance(key, int) else int(match[1]) if match else -1
    if not 0 <= index < len(layers):
        raise InvalidValueError(
            f"No block {key!r} to intervene on: give an index from 0 to {len(layers) - 1}, or a name that ends in layers.<index>, or in "
            "layers.<index>.<module>, such as layers.3.mlp."
        )
    if match is None or match[2] is None:
        return index, ""
    name = submodule_name(layers[index], match[2])
    if name is None:
        inside = ", ".join(name for name in submodules(layers[index]) if "." not in name)
        raise InvalidValueError(f"Block {index} has no module {match[2]!r}. Its modules are {inside}, and what is inside them.")
    return index, name


class SubmoduleRecorder:
    """Records, and edits, the outputs of the modules inside the blocks during one forward pass.

    Args:
        layers: the blocks.
        edits: {(block, name of the module in it): function of its output that returns the output to use instead}.

    Attributes:
        outputs: {(block, name): output of the module}, in the order of the calls. Of a module that returns several values, the first array; of one
            that runs several times, the last output. A module that does not run has none.
    """

    def __init__(self, layers: Sequence[nn.Module], edits: Mapping[tuple[int, str], Callable[[mx.array], mx.array]]) -> None:
        self.edits = edits
        self.outputs: dict[tuple[int, str], mx.array] = {}
        self._places: dict[int, tuple[int, str]] = {}
        self._modules: list[nn.Module] = []
        blocks = {id(layer) for layer in layers}
        for i, layer in enumerate(layers):
            for name, module in submodules(layer).items():
                if id(module) not in self._places and id(module) not in blocks:
                    self._places[id(module)] = i, name
                    self._modules.append(module)

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: inside it, every call of a module is recorded."""
        recorder = weakref.proxy(self)  # as in `capture`: classes belong to reference cycles

        def recording(original: type) -> dict[str, Callable[..., Any]]:
            def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return recorder.record(module, original.__call__(module, *args, **kwargs))

            return {"__call__": call}

        return replaced_methods(self._modules, recording)

    def record(self, module: nn.Module, output: Any) -> Any:
        """Keep the output of a module. Return it, edited if there is an edit."""
        place = self._places[id(module)]
        has_more = isinstance(output, (tuple, list))
        value = output[0] if has_more and output else output
        if not isinstance(value, mx.array):
            return output
        edit = self.edits.get(place)
        if edit is not None:
            value = edit(value)
            output = type(output)([value, *output[1:]]) if has_more else value
        self.outputs[place] = snapshot(value)
        return output
