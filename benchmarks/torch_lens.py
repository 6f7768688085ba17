"""Train a lens in plain PyTorch as upstream's tuned-lens does: one layer after another, each with its own logits, loss and backward pass.

The model is the demo model with its weights dequantized. The work is that of upstream's loop: per sequence, a forward pass without
gradient and the model's log-probabilities once, then per layer the translator, the norm, all logits, the KL and `backward`; per step, one
clipped SGD step with Nesterov momentum and a linearly falling learning rate.

The settings are metalens's where the two differ, so that the trained lenses can be compared: the loss is the mean over layers (upstream:
the sum), there is no weight decay, and translator i reads the output of block i (upstream: its input). These differences do not change
the work.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.nn as nn
import numpy as np
from benchmarks.competitor import tensor, torch_module
from benchmarks.operations.lens import dense

from metalens.ops.weight import Weight
from metalens.training import TrainingConfig


class TrainedModel(Protocol):
    """What `train` asks of a model.

    Attributes:
        blocks: the blocks.
        embedding: the matrix of the embedding [V, D].
    """

    blocks: Any
    embedding: Any

    def hidden(self, ids: Any) -> list[Any]:
        """Return the output [B, T, D] of every block for ids [B, T]."""

    def unembed(self, h: Any) -> Any:
        """Return the logits [..., V] of hidden states [..., D]."""


class TorchModel:
    """A Llama with a tied embedding, such as the demo model and SmolLM2, in float32."""

    # Positions that the tables of angles have at least: more than the demo model was trained for.
    POSITIONS = 512

    def __init__(self, model: nn.Module) -> None:
        self.args = model.args
        self.head_dim = self.args.head_dim or self.args.hidden_size // self.args.num_attention_heads
        self.embedding = _matrix(model.model.embed_tokens)
        self.norm = tensor(model.model.norm.weight)
        self.blocks = [
            {name: _matrix(getattr(block.self_attn, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            | {name: _matrix(getattr(block.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")}
            | {"attention_norm": tensor(block.input_layernorm.weight), "mlp_norm": tensor(block.post_attention_layernorm.weight)}
            for block in model.model.layers
        ]
        torch = torch_module()
        half = self.head_dim // 2
        frequencies = self.args.rope_theta ** -(torch.arange(half) / half)
        angles = torch.outer(torch.arange(max(self.args.max_position_embeddings, self.POSITIONS)), frequencies)
        self.cos, self.sin = angles.cos(), angles.sin()

    def normed(self, h: Any, gain: Any) -> Any:
        """Return the RMS norm of h."""
        return torch_module().nn.functional.rms_norm(h, (h.shape[-1],), gain, self.args.rms_norm_eps)

    def unembed(self, h: Any) -> Any:
        """Return the logits [..., V] of hidden states [..., D]."""
        return torch_module().nn.functional.linear(self.normed(h, self.norm), self.embedding)

    def hidden(self, ids: Any) -> list[Any]:
        """Return the output [B, T, D] of every block for ids [B, T]."""
        functional = torch_module().nn.functional
        h, outputs = functional.embedding(ids, self.embedding), []
        for block in self.blocks:
            n = self.normed(h, block["attention_norm"])
            q, k, v = (self._heads(functional.linear(n, block[name])) for name in ("q_proj", "k_proj", "v_proj"))
            a = functional.scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=True, enable_gqa=True)
            h = h + functional.linear(a.transpose(1, 2).flatten(2), block["o_proj"])
            n = self.normed(h, block["mlp_norm"])
            gated = functional.silu(functional.linear(n, block["gate_proj"])) * functional.linear(n, block["up_proj"])
            h = h + functional.linear(gated, block["down_proj"])
            outputs.append(h)
        return outputs

    def _heads(self, x: Any) -> Any:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, x: Any) -> Any:
        a, b = x.chunk(2, -1)
        cos, sin = (angles[: x.shape[-2]].to(x.dtype) for angles in (self.cos, self.sin))
        return torch_module().cat((a * cos - b * sin, b * cos + a * sin), -1)


def _matrix(layer: nn.Module) -> Any:
    """Return the dequantized weight of an MLX layer."""
    return tensor(dense(Weight.from_layer(layer)))


def train(model: TrainedModel, sequences: list[np.ndarray], config: TrainingConfig, bf16: bool) -> list[Any]:
    """Train for `config.num_steps` steps on sequences [1, T]; return the weights W - I [L, D, D] and the biases [L, D] of `config.layers`.

    bf16 runs model and lens under autocast. Upstream runs its lens so, on every device, and its model in the type of the checkpoint.
    """
    torch = torch_module()
    layers, hidden_size = config.layers or tuple(range(len(model.blocks))), model.embedding.shape[1]
    translators = [torch.nn.Linear(hidden_size, hidden_size) for _ in layers]
    parameters = [p for translator in translators for p in translator.parameters()]
    for p in parameters:
        torch.nn.init.zeros_(p)  # the residual form is h + W h + b
    optimizer = torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.num_steps)
    for step in range(config.num_steps):
        for ids in sequences[step * config.sequences_per_step : (step + 1) * config.sequences_per_step]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    hidden = model.hidden(torch.from_numpy(ids))
                    log_p = model.unembed(hidden[-1]).float().log_softmax(-1)
                for translator, layer in zip(translators, layers, strict=True):
                    h = hidden[layer]
                    log_q = model.unembed(h + translator(h)).float().log_softmax(-1)
                    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
                    (loss / (len(layers) * config.sequences_per_step)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return [torch.stack([t.weight for t in translators]), torch.stack([t.bias for t in translators])]
