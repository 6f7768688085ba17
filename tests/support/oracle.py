"""Compute the package's results again in float64 NumPy, slowly and plainly, for the tests to compare with."""

import mlx.core as mx
import numpy as np

from metalens import TunedLens
from metalens.ops import Head, Weight

# Relative error that rounding a result to a type may cause. Sums are in float32, so float32 is no better than 1e-6.
EPSILON = {mx.float32: 1e-6, mx.float16: 5e-4, mx.bfloat16: 4e-3}


def wide(a):
    """Convert an MLX array to float64 NumPy."""
    return np.array(a.astype(mx.float32)).astype(np.float64)


def codes(w):
    """Return the integers [O, I] that an affine weight packs: its values with scale 1 and bias 0, exact in float32."""
    ones = mx.ones(w.scales.shape)
    return wide(mx.dequantize(w.values, ones, mx.zeros(w.scales.shape), w.group_size, w.bits))


def matrix_and_magnitude(w):
    """Return W [O, I], dequantized without rounding, and |scale| * code + |bias|.

    Rounding errors are relative to the second, also where scale * code and bias cancel.
    """
    if w.scales is None:
        return wide(w.values), np.abs(wide(w.values))
    if w.mode != "affine":  # a product of a few bits and a power of two or a few bits is exact in float32
        values = wide(mx.dequantize(w.values, w.scales, None, w.group_size, w.bits, w.mode, dtype=mx.float32))
        return values, np.abs(values)
    c, scales, biases = codes(w), np.repeat(wide(w.scales), w.group_size, axis=1), np.repeat(wide(w.biases), w.group_size, axis=1)
    return scales * c + biases, np.abs(scales) * c + np.abs(biases)


def matrix(w):
    """Return W [O, I], dequantized without rounding."""
    return matrix_and_magnitude(w)[0]


def product(x, w, transpose=True):
    """Return the product x W^T, or x W if not `transpose`."""
    return product_and_bound(x, w, transpose)[0]


def product_and_bound(x, w, transpose=True, epsilon=1e-6):
    """Return the product, and the error allowed to a float32 sum that was rounded once to a type of this epsilon.

    4e-8 is half a float16 subnormal.
    """
    values, size = (m.T if transpose else m for m in matrix_and_magnitude(w))
    expected = wide(x) @ values
    return expected, epsilon * np.abs(expected) + 1e-6 * (np.abs(wide(x)) @ size) + 4e-8


def assert_product(y, x, w, transpose=True, epsilon=None):
    """Check that `y` is x W^T (or x W) within the rounding of y's type, or within the given epsilon."""
    expected, bound = product_and_bound(x, w, transpose, EPSILON[y.dtype] if epsilon is None else epsilon)
    assert y.shape == expected.shape
    excess = np.abs(wide(y) - expected) - bound
    assert not excess.size or excess.max() <= 0, f"off by {excess.max():.3g} more than allowed"


def assert_product_of_mlx(y, x, w, transpose, dtype):
    """Check that `y` is the product within the errors of plain MLX in `dtype`.

    MLX may add in that type, so the errors grow like a random walk.
    """
    expected, size = wide(x) @ (matrix(w).T if transpose else matrix(w)), np.abs(wide(x)) @ (np.abs(matrix(w)).T if transpose else np.abs(matrix(w)))
    assert (np.abs(wide(y) - expected) <= 4 * EPSILON[dtype] * x.shape[-1] ** 0.5 * size + 1e-5).all()  # 1e-5: float16 rounds small scales


def random_weight(rng, outputs, inputs, bits=4, group_size=32, dtype=mx.float32, scale=1.0):
    """Return a quantized weight with every possible code, and with scales and biases of both signs."""
    values = rng.integers(0, 2**32, (outputs, inputs * bits // 32), dtype=np.uint32)
    shape = (outputs, inputs // group_size)
    scales, biases = (mx.array(rng.standard_normal(shape) * size).astype(dtype) for size in (scale / 2**bits, scale))
    return Weight(mx.array(values), scales, biases, group_size, bits)


# {mode: (bits, group size)} of the formats that have one 8-bit float per group as its scale.
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def random_float_weight(rng, outputs, inputs, mode):
    """Return a weight with every finite code of a FLOAT_MODES format, and with scales of many exponents; nvfp4 scales have both signs.

    All values are in the range of float16.
    """
    bits, group_size = FLOAT_MODES[mode]
    values = rng.integers(0, 256, (outputs, inputs * bits // 8), dtype=np.uint8)
    scales = rng.integers(114, 120 if mode == "mxfp8" else 130, (outputs, inputs // group_size), dtype=np.uint8)
    if mode == "mxfp8":
        values[values % 128 == 127] = 0  # NaN
    if mode == "nvfp4":
        scales = rng.integers(0, 256, scales.shape, dtype=np.uint8)
        scales[scales % 128 >= 96] = 56  # NaN, and scales of 32 and more
    return Weight(mx.array(values.view(np.uint32)), mx.array(scales), None, group_size, bits, mode)


def random_array(rng, *shape, dtype=mx.float32, scale=1.0):
    """Return an array of normally distributed values with the standard deviation `scale`."""
    return mx.array((rng.standard_normal(shape) * scale).astype(np.float32)).astype(dtype)


# Arguments of make_head for every logit transform that a head may have.
HEADS = {
    "linear": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 2.0, "softcap": 6.0},
    "negative scale": {"bias": True, "scale": -0.75},
    "padding": {"bias": True, "padding": 17},
    "padding and softcap": {"scale": 1.5, "softcap": 5.0, "padding": 17},
    "offset": {"offset": 3.0},
    "all and offset": {"bias": True, "scale": 2.0, "softcap": 6.0, "padding": 17, "offset": 3.0},
}


def make_head(rng, outputs, inputs, quantized=True, bias=False, padding=0, offset=0.0, **transform):
    """Return a head with `outputs` rows, of which the last `padding` rows are not tokens. `offset`: standard deviation of the offset; 0 = none."""
    weight = random_weight(rng, outputs, inputs, scale=0.2) if quantized else Weight(random_array(rng, outputs, inputs, scale=0.2))
    if padding:
        transform["used_rows"] = outputs - padding
    u0 = random_array(rng, outputs) if bias else None
    return Head(weight, u0, **transform, offset=random_array(rng, outputs, scale=offset) if offset else None)


def random_lens(rng, num_layers=3, hidden_dim=64):
    """Return a lens far from the identity, where no term of the gradient vanishes."""
    lens = TunedLens(num_layers, hidden_dim)
    for translator in lens.translators:
        translator.weight = mx.eye(hidden_dim) + random_array(rng, hidden_dim, hidden_dim, scale=0.3 / hidden_dim**0.5)
        translator.bias = random_array(rng, hidden_dim, scale=0.1)
    return lens


def rms_norm(h, weight, eps):
    """Return the RMS norm of rows [..., D]."""
    return h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + eps) * weight


def log_softmax(z):
    """Return the logarithm of the softmax over the last axis."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def present(stats):
    """Return the arrays of a LensStats that were asked for, by name."""
    return {name: array for name, array in vars(stats).items() if array is not None}


def softmax(z):
    """Return the softmax over the last axis."""
    return np.exp(log_softmax(z))


def entropy(z):
    """Return the entropy of softmax(z) in nats."""
    log_p = log_softmax(z)
    p = np.exp(log_p)
    return -np.sum(p * np.where(p > 0, log_p, 0), axis=-1)


def kl_and_difference(z_model, z_lens):
    """Return KL(softmax(z_model) || softmax(z_lens)) in nats and q - p, with small relative errors also where p and q are nearly equal.

    A token that the model rules out adds nothing. A token that only the lens rules out makes the KL infinite.
    """
    log_p, log_q = log_softmax(z_model), log_softmax(z_lens)
    p, q = np.exp(log_p), np.exp(log_q)
    possible = p > 0
    with np.errstate(over="ignore"):
        t = np.where(possible, log_q, 0) - np.where(possible, log_p, 0)
        near = np.abs(t) < 1
        rise = np.where(near, np.expm1(np.where(near, t, 0)), 0)
        difference = np.where(near & possible, p * rise, q - p)
        # sum(q - p) is 0. Adding it makes every term positive.
        bend = np.where(near, p * (rise - np.where(near, t, 0)), q - p - np.where(possible, p * t, 0))
    return np.sum(np.where(possible, bend, q), axis=-1), difference


def kl(z_model, z_lens):
    """Return KL(softmax(z_model) || softmax(z_lens)) in nats."""
    return kl_and_difference(z_model, z_lens)[0]


def comparison(z_a, z_b):
    """Return {"kl", "reverse_kl", "js", "tv"} of softmax(z_a) and softmax(z_b), as `lens_compare` defines them."""
    z_a, z_b = np.broadcast_arrays(z_a, z_b)
    p, q = softmax(z_a), softmax(z_b)
    with np.errstate(divide="ignore", invalid="ignore"):
        m = (p + q) / 2
        js = np.where(p > 0, p * np.log(p / m), 0).sum(-1) + np.where(q > 0, q * np.log(q / m), 0).sum(-1)
    return {"kl": kl(z_a, z_b), "reverse_kl": kl(z_b, z_a), "js": js / 2, "tv": np.abs(p - q).sum(-1) / 2}


def head_logits(n, head):
    """Return the logits softcap(scale * (U n + u0)) + offset of normed rows n (float64 NumPy), with -inf for padding."""
    z = capped_logits(n, head)
    if head.offset is not None:
        z = z + wide(head.offset)
    z[..., head.tokens :] = -np.inf
    return z


def capped_logits(n, head):
    """Return the logits before the offset, of padding too."""
    z = n @ matrix(head.weight).T
    if head.bias is not None:
        z = z + wide(head.bias)
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * np.tanh(z / head.softcap)
    return z


def lens_kl(n, n_model, head):
    """Return KL(model || lens) [L, N] of rows (MLX arrays) in nats, and its gradient at n [L, N, D]."""
    z_model, z = (head_logits(wide(a), head) for a in (n_model, n))
    value, difference = kl_and_difference(z_model, z)
    if head.softcap is not None:
        difference = difference * (1 - (capped_logits(wide(n), head) / head.softcap) ** 2)
    return value, head.scale * difference @ matrix(head.weight)


def row_errors(ours, expected):
    """Return |ours - expected| / |expected| of every row [..., D] in Euclidean length; rows whose expected value is 0 are not divided."""
    size = np.linalg.norm(expected, axis=-1)
    return np.linalg.norm(wide(ours) - expected, axis=-1) / np.where(size > 0, size, 1)


class Unembedding:
    """Compute unembed(norm(W h + b)) of a model with an RMS norm; the weights are converted to float64 once."""

    def __init__(self, unembed):
        self.gain = wide(unembed.norm.weight)
        self.eps = unembed.norm.eps
        self.head = unembed.head
        self.matrix_t = matrix(unembed.head.weight).T

    def logits(self, h):
        """Return the logits [..., V] of hidden states [..., D], for a head without bias, scale and softcap as in the test models."""
        return rms_norm(h, self.gain, self.eps) @ self.matrix_t

    def translated(self, h, weight, bias):
        """Return the logits of translated hidden states, W h + b."""
        return self.logits(h @ weight.T + bias)


def central_difference(function, values, index, step=1e-5):
    """Return d function / d values[index], for a float64 array that `function` reads."""
    kept = values[index]
    values[index] = kept + step
    above = function()
    values[index] = kept - step
    below = function()
    values[index] = kept
    return (above - below) / (2 * step)
