"""The operations that a lens rests on: arrays in, arrays out, knowing no models.

One file each: the contract, the plain-MLX reference, and the choice of backend.
"""

from metalens.ops.activation import swiglu
from metalens.ops.attention import attention
from metalens.ops.backend import backend, precision, use_backend, use_precision
from metalens.ops.lens_kl import LensTarget, lens_kl, lens_target
from metalens.ops.lens_stats import LensStats, lens_stats
from metalens.ops.linear import linear, quantized_matmul
from metalens.ops.translate_norm import Norm, normed, translate_norm
from metalens.ops.unembed import Head, head_logits
from metalens.weight import Weight

__all__ = [
    "Head",
    "LensStats",
    "LensTarget",
    "Norm",
    "Weight",
    "attention",
    "backend",
    "head_logits",
    "lens_kl",
    "lens_stats",
    "lens_target",
    "linear",
    "normed",
    "precision",
    "quantized_matmul",
    "swiglu",
    "translate_norm",
    "use_backend",
    "use_precision",
]
