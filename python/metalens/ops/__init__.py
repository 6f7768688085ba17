"""The operations that a lens rests on: arrays in, arrays out, knowing no models.

One file each: the contract, the plain-MLX reference, and the choice of backend.
"""

from metalens.ops.backend import backend, use_backend
from metalens.ops.lens_kl import lens_kl
from metalens.ops.lens_stats import LensStats, lens_stats
from metalens.ops.linear import Weight, linear, quantized_matmul
from metalens.ops.unembed import Head, head_logits

__all__ = ["Head", "LensStats", "Weight", "backend", "head_logits", "lens_kl", "lens_stats", "linear", "quantized_matmul", "use_backend"]
