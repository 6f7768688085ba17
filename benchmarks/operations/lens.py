"""The two lens operations on a 4-bit head: `lens_kl` with its target and gradient, and `lens_stats`.

Inputs are random: an unembedding with codes of equal frequency, scaled so that logits have a standard deviation of 3, and lens rows that share 0.8 of
their direction with the model's row of the same token.
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
CODE_DEVIATION = 4.61  # of 4-bit codes that are all equally frequent


@dataclass(frozen=True)
class Shape:
    """L layers of `tokens` rows of width D, and V rows of U."""

    width: int
    vocab: int
    tokens: int
    layers: int = 8

    @property
    def rows(self) -> int:
        return self.layers * self.tokens

    @property
    def kl_flop(self) -> float:
        """That the task needs: the model's logits, the lens's, and the gradient's product with U."""
        return 2.0 * self.width * self.vocab * (self.tokens + 2 * self.rows)

    @property
    def stats_flop(self) -> float:
        return 2.0 * self.width * self.vocab * (self.tokens + self.rows)

    @property
    def packed_bytes(self) -> float:
        """Of U: codes, and a scale and a bias of 16 bits per group."""
        return self.vocab * self.width * (BITS / 8 + 4 / GROUP_SIZE)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """The inputs of one shape."""

    n: mx.array
    n_model: mx.array
    labels: mx.array
    head: Head


def random_weight(rng: np.random.Generator, outputs: int, inputs: int, deviation: float) -> Weight:
    """A 4-bit matrix [outputs, inputs] whose entries have this standard deviation, with 16-bit scales as models have them."""
    codes = mx.array(rng.integers(0, 2**32, (outputs, inputs * BITS // 32), dtype=np.uint32))
    spread = rng.uniform(0.5, 1.5, (outputs, inputs // GROUP_SIZE)) * deviation / CODE_DEVIATION
    scales = mx.array(spread.astype(np.float32)).astype(mx.bfloat16)
    weight = Weight(codes, scales, (-7.5 * scales.astype(mx.float32)).astype(mx.bfloat16), GROUP_SIZE, BITS)
    mx.eval(weight.values, weight.scales, weight.biases)
    return weight


def dense(weight: Weight) -> mx.array:
    """The same matrix in float32."""
    parts = (weight.scales, weight.biases)
    values = mx.dequantize(weight.values, *(a.astype(mx.float32) for a in parts if a is not None), weight.group_size, weight.bits)
    mx.eval(values)
    return values


def make_problem(shape: Shape) -> Problem:
    """The inputs of this shape, the same in every process."""
    rng = np.random.default_rng(0)
    of_model = rng.standard_normal((shape.tokens, shape.width)).astype(np.float32)
    own = rng.standard_normal((shape.layers, shape.tokens, shape.width)).astype(np.float32)
    n, n_model = mx.array(0.8 * of_model + 0.6 * own), mx.array(of_model)
    labels = mx.array(rng.integers(0, shape.vocab, shape.tokens))
    mx.eval(n, n_model, labels)
    return Problem(n, n_model, labels, Head(random_weight(rng, shape.vocab, shape.width, 3 / shape.width**0.5)))


def make(name: str, operation: str, **sizes: int) -> Competitor:
    """A competitor in 'kl' or 'stats'."""
    shape = Shape(**sizes)
    problem = make_problem(shape)
    if name.startswith("PyTorch"):
        return torch_competitor(shape.tokens, (_torch_kl if operation == "kl" else _torch_stats)(problem, name == TORCH_BF16))
    return mlx_competitor(name, shape.tokens, (_mlx_kl if operation == "kl" else _mlx_stats)(problem))


def _mlx_kl(p: Problem) -> Callable[[int], list[mx.array]]:
    """[kl [L, N], its gradient [L, N, D]]."""
    return lambda tokens: list(lens_kl(p.n[:, :tokens], lens_target(p.n_model[:tokens], p.head), p.head))


def _mlx_stats(p: Problem) -> Callable[[int], list[mx.array]]:
    """[entropy, kl, nll, top logits]."""

    def compute(tokens: int) -> list[mx.array]:
        stats = lens_stats(p.n[:, :tokens], p.head, TOP_K, p.n_model[:tokens], p.labels[:tokens])
        mx.eval([value for value in vars(stats).values() if value is not None])
        return [value for value in (stats.entropy, stats.kl, stats.nll, stats.top_logits) if value is not None]

    return compute


def _torch_inputs(p: Problem, bf16: bool) -> tuple[Any, Any, Any, Any]:
    torch = torch_module()
    u = tensor(dense(p.head.weight))
    return tensor(p.n), tensor(p.n_model), tensor(p.labels), u.to(torch.bfloat16) if bf16 else u


def _torch_kl(p: Problem, bf16: bool) -> Callable[[int], list[Any]]:
    """The straightforward way, with a dense U: all logits, log-softmax, KL, and the way back by autograd. bf16 by autocast."""
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
    """Everything that `lens_stats` returns, from all logits at once."""
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
