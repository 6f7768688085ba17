"""Compute the two lens operations on a 4-bit head: `lens_kl` with its target and gradient, and `lens_stats`.

Inputs are random. The unembedding has codes of equal frequency, scaled so that logits have a standard deviation of 3. Each lens row has
a correlation of 0.8 with the model's row of the same token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from benchmarks.competitor import TORCH_BF16, Competitor, mlx_competitor, tensor, torch_competitor, torch_module

from metalens.ops import Head, Weight, lens_kl, lens_stats, lens_target

GROUP_SIZE, BITS, TOP_K = 64, 4, 10
CODE_DEVIATION = 4.61  # standard deviation of equally frequent 4-bit codes


@dataclass(frozen=True)
class Shape:
    """The shape of a problem.

    Attributes:
        hidden_size: D, columns of the unembedding U.
        vocab_size: V, rows of U.
        tokens: N, rows of one layer.
        num_layers: L, number of layers.
    """

    hidden_size: int
    vocab_size: int
    tokens: int
    num_layers: int = 8

    @property
    def rows(self) -> int:
        """Return the rows of all layers."""
        return self.num_layers * self.tokens

    @property
    def kl_flop(self) -> float:
        """Return the FLOP that `lens_kl` needs: the model's logits, the lens's logits, and the gradient's product with U."""
        return 2.0 * self.hidden_size * self.vocab_size * (self.tokens + 2 * self.rows)

    @property
    def stats_flop(self) -> float:
        """Return the FLOP that `lens_stats` needs: the model's logits and the lens's logits."""
        return 2.0 * self.hidden_size * self.vocab_size * (self.tokens + self.rows)

    @property
    def packed_bytes(self) -> float:
        """Return the bytes of the packed U: codes, and a scale and a bias of 16 bits per group."""
        return self.vocab_size * self.hidden_size * (BITS / 8 + 4 / GROUP_SIZE)

    def to_dict(self) -> dict[str, int]:
        """Return the shape as arguments of `make`."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """The inputs of one shape: lens rows n [L, N, D], the model's rows n_model [N, D], labels [N] and a head."""

    n: mx.array
    n_model: mx.array
    labels: mx.array
    head: Head


def random_weight(rng: np.random.Generator, outputs: int, inputs: int, deviation: float) -> Weight:
    """Return a 4-bit matrix [outputs, inputs] whose entries have this standard deviation, with 16-bit scales as in real models."""
    codes = mx.array(rng.integers(0, 2**32, (outputs, inputs * BITS // 32), dtype=np.uint32))
    spread = rng.uniform(0.5, 1.5, (outputs, inputs // GROUP_SIZE)) * deviation / CODE_DEVIATION
    scales = mx.array(spread.astype(np.float32)).astype(mx.bfloat16)
    weight = Weight(codes, scales, (-7.5 * scales.astype(mx.float32)).astype(mx.bfloat16), GROUP_SIZE, BITS)
    mx.eval(weight.values, weight.scales, weight.biases)
    return weight


def dense(weight: Weight) -> mx.array:
    """Return a quantized matrix in float32."""
    parts = (weight.scales, weight.biases)
    values = mx.dequantize(weight.values, *(a.astype(mx.float32) for a in parts if a is not None), weight.group_size, weight.bits)
    mx.eval(values)
    return values


def make_problem(shape: Shape) -> Problem:
    """Return the inputs of this shape, the same in every process."""
    rng = np.random.default_rng(0)
    of_model = rng.standard_normal((shape.tokens, shape.hidden_size)).astype(np.float32)
    own = rng.standard_normal((shape.num_layers, shape.tokens, shape.hidden_size)).astype(np.float32)
    n, n_model = mx.array(0.8 * of_model + 0.6 * own), mx.array(of_model)
    labels = mx.array(rng.integers(0, shape.vocab_size, shape.tokens))
    mx.eval(n, n_model, labels)
    return Problem(n, n_model, labels, Head(random_weight(rng, shape.vocab_size, shape.hidden_size, 3 / shape.hidden_size**0.5)))


def make(name: str, operation: str, **sizes: int) -> Competitor:
    """Return a competitor for the operation 'kl' or 'stats'."""
    shape = Shape(**sizes)
    problem = make_problem(shape)
    if name.startswith("PyTorch"):
        return torch_competitor(shape.tokens, (_torch_kl if operation == "kl" else _torch_stats)(problem, name == TORCH_BF16))
    return mlx_competitor(name, shape.tokens, (_mlx_kl if operation == "kl" else _mlx_stats)(problem))


def _mlx_kl(p: Problem) -> Callable[[int], list[mx.array]]:
    """Return a function that computes [kl [L, N], its gradient [L, N, D]] with metalens."""
    return lambda tokens: list(lens_kl(p.n[:, :tokens], lens_target(p.n_model[:tokens], p.head), p.head))


def _mlx_stats(p: Problem) -> Callable[[int], list[mx.array]]:
    """Return a function that computes [entropy, kl, nll, top logits] with metalens."""

    def compute(tokens: int) -> list[mx.array]:
        stats = lens_stats(p.n[:, :tokens], p.head, TOP_K, p.n_model[:tokens], p.labels[:tokens])
        mx.eval([value for value in vars(stats).values() if value is not None])
        return [value for value in (stats.entropy, stats.kl, stats.nll, stats.top_logits) if value is not None]

    return compute


def _torch_inputs(p: Problem, bf16: bool) -> tuple[Any, Any, Any, Any]:
    """Return n, n_model, labels and the dense U as tensors."""
    torch = torch_module()
    u = tensor(dense(p.head.weight))
    return tensor(p.n), tensor(p.n_model), tensor(p.labels), u.to(torch.bfloat16) if bf16 else u


def _torch_kl(p: Problem, bf16: bool) -> Callable[[int], list[Any]]:
    """Return the textbook computation with a dense U: all logits, log-softmax, KL, and autograd. bf16 runs it under autocast."""
    torch = torch_module()
    n, n_model, _, u = _torch_inputs(p, bf16)

    def compute(tokens: int) -> list[Any]:
        rows = n[:, :tokens].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                log_p = torch.nn.functional.linear(n_model[:tokens], u).float().log_softmax(-1)
            log_q = torch.nn.functional.linear(rows, u).float().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl.sum().backward()
        return [kl, rows.grad]

    return compute


def _torch_stats(p: Problem, bf16: bool) -> Callable[[int], list[Any]]:
    """Return a computation of all results of `lens_stats` from all logits at once."""
    torch = torch_module()
    n, n_model, labels, u = _torch_inputs(p, bf16)

    def compute(tokens: int) -> list[Any]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z_model = torch.nn.functional.linear(n_model[:tokens], u).float()
            z = torch.nn.functional.linear(n[:, :tokens], u).float()
            log_p, log_q = z_model.log_softmax(-1), z.log_softmax(-1)
            q = log_q.exp()
            entropy = -(q * log_q).sum(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            top = z.topk(TOP_K, -1)
            of_label = labels[:tokens].expand(z.shape[:2])[..., None]
            nll = -log_q.gather(-1, of_label)[..., 0]
            _ = (z > z.gather(-1, of_label)).sum(-1), q.amax(-1), z.logsumexp(-1), top.indices[..., 0] == z_model.argmax(-1)
        return [entropy, kl, nll, top.values]

    return compute
