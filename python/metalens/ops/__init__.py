"""The operations of a lens: arrays in, arrays out. They know no models.

Each file holds one operation: its contract, its plain-MLX reference and its kernels. `dispatch` holds the table that selects
one of them, `backends` the settings that it reads.
"""

from metalens.ops.activation import gelu_approx, swiglu
from metalens.ops.backends import backend, precision, use_backend, use_precision
from metalens.ops.compare import LensComparison, lens_compare
from metalens.ops.cross_entropy import lens_ce
from metalens.ops.head import Head
from metalens.ops.kl import LensTarget, lens_kl, lens_target
from metalens.ops.logits import head_logits
from metalens.ops.matmul import gram, linear, quantized_matmul
from metalens.ops.muon import MuonDirection, muon_direction
from metalens.ops.norm import Norm
from metalens.ops.rotary import rope
from metalens.ops.row_norms import layer_norm, rms_norm
from metalens.ops.sdpa import attention
from metalens.ops.stats import LensStats, lens_stats
from metalens.ops.translate import normed, translate_norm
from metalens.ops.weight import Weight

__all__ = [
    "Head",
    "LensComparison",
    "LensStats",
    "LensTarget",
    "MuonDirection",
    "Norm",
    "Weight",
    "attention",
    "backend",
    "gelu_approx",
    "gram",
    "head_logits",
    "layer_norm",
    "lens_ce",
    "lens_compare",
    "lens_kl",
    "lens_stats",
    "lens_target",
    "linear",
    "muon_direction",
    "normed",
    "precision",
    "quantized_matmul",
    "rms_norm",
    "rope",
    "swiglu",
    "translate_norm",
    "use_backend",
    "use_precision",
]
