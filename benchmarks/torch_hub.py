"""A model in PyTorch by transformers, as upstream's tuned-lens runs it: for architectures that `torch_lens.TorchModel` does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from benchmarks.competitor import tensor
from benchmarks.operations.lens import dense
from mlx.utils import tree_flatten

from metalens.ops.weight import Weight


class HubModel:
    """A model of transformers with the dequantized weights of an MLX model, in float32. It offers what `torch_lens.train` calls.

    Args:
        folder: the model's folder, whose config.json transformers reads.
        model: the MLX model, with the names of transformers.

    Attributes:
        blocks: the blocks.
        embedding: the matrix of the embedding [V, D].

    Raises:
        ValueError: if the two do not have the same parameters.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of MLX: transformers gets plain weights
        config.dtype = "float32"
        self._model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        missing, unexpected = self._model.load_state_dict(_parameters(model), strict=False)
        missing = [name for name in missing if name != "lm_head.weight"]  # tied to the embedding
        if missing or unexpected:
            raise ValueError(f"transformers has other parameters than MLX: it lacks {unexpected[:3]} and asks for {missing[:3]}.")
        self._model.tie_weights()
        self.blocks = self._model.model.layers
        self.embedding = self._model.get_input_embeddings().weight

    def unembed(self, h: Any) -> Any:
        """Return the logits [..., V] of hidden states [..., D]."""
        return self._model.lm_head(self._model.model.norm(h))

    def hidden(self, ids: Any) -> list[Any]:
        """Return the output [B, T, D] of every block for ids [B, T]."""
        outputs: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            self._model.model(ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _parameters(model: nn.Module) -> dict[str, Any]:
    """Return the parameters of an MLX model as PyTorch's, dequantized, by name."""
    quantized = {name: module for name, module in model.named_modules() if "scales" in module}
    found = {f"{name}.weight": tensor(dense(Weight.from_layer(module))) for name, module in quantized.items()}
    for name, value in tree_flatten(model.parameters()):
        if name.rpartition(".")[0] not in quantized:
            found[name] = tensor(value)
    return found
