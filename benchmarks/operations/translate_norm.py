"""Compute RMSNorm(W h + b) for a layer's rows, and its gradient at W and b: the work of a step on one translator."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from benchmarks.competitor import Competitor, mlx_competitor, tensor, torch_competitor, torch_module

from metalens.ops import Norm, translate_norm

EPS = 1e-5


def make(name: str, rows: int, hidden_size: int, gradient: bool) -> Competitor:
    """Return a competitor whose result is [n], or [n, dW, db] with gradient."""
    rng = np.random.default_rng(0)
    d = hidden_size
    normal = [rng.standard_normal(shape).astype(np.float32) for shape in ((rows, d), (d, d), (d,), (d,), (rows, d))]
    h, noise, bias, gain, cotangent = map(mx.array, normal)
    weight = mx.eye(d) + 0.3 * noise / d**0.5
    mx.eval(h, weight, bias, gain, cotangent)
    if name.startswith("PyTorch"):
        return _torch(gradient, *map(tensor, (h, weight, bias, gain, cotangent)))
    norm = Norm(lambda y: mx.fast.rms_norm(y, gain, EPS), "rms", gain, None, EPS)

    def compute(count: int) -> list[mx.array]:
        def forward(weight: mx.array, bias: mx.array) -> mx.array:
            return translate_norm(h[:count], weight, bias, norm)

        if not gradient:
            return [forward(weight, bias)]
        (n,), gradients = mx.vjp(forward, [weight, bias], [cotangent[:count]])
        return [n, *gradients]

    return mlx_competitor(name, rows, compute)


def _torch(gradient: bool, h, weight, bias, gain, cotangent) -> Competitor:
    torch = torch_module()

    def compute(count: int) -> list:
        w, b = weight.detach().requires_grad_(gradient), bias.detach().requires_grad_(gradient)
        w.grad = b.grad = None
        y = torch.nn.functional.linear(h[:count], w, b)
        n = torch.nn.functional.rms_norm(y, (y.shape[-1],), gain, EPS)
        if not gradient:
            return [n]
        n.backward(cotangent[:count])
        return [n, w.grad, b.grad]

    return torch_competitor(h.shape[0], compute)
