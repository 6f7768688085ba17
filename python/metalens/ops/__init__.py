"""The operations that a lens rests on: arrays in, arrays out, knowing no models.

One file each: the contract, the plain-MLX reference, and the choice of backend.
"""

from metalens.ops.activation import swiglu
from metalens.ops.backends import backend, precision, use_backend, use_precision
from metalens.ops.head import Head
from metalens.ops.kl import LensTarget, lens_kl, lens_target
from metalens.ops.logits import head_logits
from metalens.ops.matmul import linear, quantized_matmul
from metalens.ops.norm import Norm
from metalens.ops.sdpa import attention
from metalens.ops.stats import LensStats, lens_stats
from metalens.ops.translate import normed, translate_norm
from metalens.ops.weight import Weight

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
