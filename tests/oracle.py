"""What the package computes, once more in float64 NumPy, slowly and plainly: what the tests compare with."""

import mlx.core as mx
import numpy as np

from metalens import TunedLens
from metalens.ops import Head, Weight

# What rounding the result to a type may cost, relative to the result; sums are in float32, so float32 is no better than 1e-6.
EPSILON = {mx.float32: 1e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}


def wide(a):
    """An MLX array as float64."""
    return np.array(a.astype(mx.float32)).astype(np.float64)


def codes(w):
    """The integers [O, I] that a quantised weight packs: its values with scale 1 and bias 0, exact in float32."""
    ones = mx.ones(w.scales.shape)
    return wide(mx.dequantize(w.values, ones, mx.zeros(w.scales.shape), w.group_size, w.bits))


def matrix_and_magnitude(w):
    """W [O, I], dequantised without a rounding; and |scale| * code + |bias|, what its rounding errors are relative to, also where the two cancel."""
    if w.scales is None:
        return wide(w.values), np.abs(wide(w.values))
    c, scales, biases = codes(w), np.repeat(wide(w.scales), w.group_size, axis=1), np.repeat(wide(w.biases), w.group_size, axis=1)
    return scales * c + biases, np.abs(scales) * c + np.abs(biases)


def matrix(w):
    """W [O, I], dequantised without a rounding."""
    return matrix_and_magnitude(w)[0]


def product(x, w, transpose=True):
    """X W^T, or x W."""
    return product_and_bound(x, w, transpose)[0]


def product_and_bound(x, w, transpose=True, epsilon=1e-6):
    """The product, and how far from it a float32 sum may be that was rounded once to a type of this epsilon; 4e-8 is half a float16 subnormal."""
    values, size = (m.T if transpose else m for m in matrix_and_magnitude(w))
    expected = wide(x) @ values
    return expected, epsilon * np.abs(expected) + 1e-6 * (np.abs(wide(x)) @ size) + 4e-8


def assert_product(y, x, w, transpose=True, epsilon=None):
    """`y` is x W^T (or x W) as well as y's type, or the given epsilon, allows."""
    expected, bound = product_and_bound(x, w, transpose, EPSILON[y.dtype] if epsilon is None else epsilon)
    assert y.shape == expected.shape
    excess = np.abs(wide(y) - expected) - bound
    assert not excess.size or excess.max() <= 0, f"off by {excess.max():.3g} more than allowed"


def random_weight(rng, outputs, inputs, bits=4, group_size=32, dtype=mx.float32, scale=1.0):
    """A quantised weight of every possible code, with scales and biases of both signs."""
    values = rng.integers(0, 2**32, (outputs, inputs * bits // 32), dtype=np.uint32)
    shape = (outputs, inputs // group_size)
    scales, biases = (mx.array(rng.standard_normal(shape) * size).astype(dtype) for size in (scale / 2**bits, scale))
    return Weight(mx.array(values), scales, biases, group_size, bits)


def random_array(rng, *shape, dtype=mx.float32, scale=1.0):
    return mx.array((rng.standard_normal(shape) * scale).astype(np.float32)).astype(dtype)


# Every logit transform that a head may have, as arguments of make_head.
HEADS = {
    "linear": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 2.0, "softcap": 6.0},
}


def make_head(rng, outputs, inputs, quantised=True, bias=False, **transform):
    weight = random_weight(rng, outputs, inputs, scale=0.2) if quantised else Weight(random_array(rng, outputs, inputs, scale=0.2))
    return Head(weight, random_array(rng, outputs) if bias else None, **transform)


def random_lens(rng, num_layers=3, hidden_dim=64):
    """A lens away from the identity, where no term of the gradient vanishes."""
    lens = TunedLens(num_layers, hidden_dim)
    for translator in lens.translators:
        translator.weight = mx.eye(hidden_dim) + random_array(rng, hidden_dim, hidden_dim, scale=0.3 / hidden_dim**0.5)
        translator.bias = random_array(rng, hidden_dim, scale=0.1)
    return lens


def rms_norm(h, weight, eps):
    return h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + eps) * weight


def log_softmax(z):
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def entropy(z):
    log_p = log_softmax(z)
    p = np.exp(log_p)
    return -np.sum(p * np.where(p > 0, log_p, 0), axis=-1)


def kl(z_model, z_lens):
    """KL(softmax(z_model) || softmax(z_lens)) in nats; impossible tokens of the model add nothing."""
    log_p, log_q = log_softmax(z_model), log_softmax(z_lens)
    p = np.exp(log_p)
    possible = p > 0
    return np.sum(p * (np.where(possible, log_p, 0) - np.where(possible, log_q, 0)), axis=-1)


def head_logits(n, head):
    """softcap(scale * (U n + u0)) of normed rows n (float64 NumPy)."""
    z = n @ matrix(head.weight).T
    if head.bias is not None:
        z = z + wide(head.bias)
    z = z * head.scale
    return z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)


class Unembedding:
    """unembed(norm(W h + b)) of a model with an RMS norm, its weights widened once."""

    def __init__(self, unembed):
        self.gain = wide(unembed.norm.weight)
        self.eps = unembed.norm.eps
        self.head = unembed.head
        self.matrix_t = matrix(unembed.head.weight).T

    def logits(self, h):
        """[..., V] of a residual stream [..., D]; a head without bias, scale and softcap, as the test models have."""
        return rms_norm(h, self.gain, self.eps) @ self.matrix_t

    def translated(self, h, weight, bias):
        return self.logits(h @ weight.T + bias)


def central_difference(function, values, index, step=1e-5):
    """d function / d values[index], for a float64 array that `function` reads."""
    kept = values[index]
    values[index] = kept + step
    above = function()
    values[index] = kept - step
    below = function()
    values[index] = kept
    return (above - below) / (2 * step)
