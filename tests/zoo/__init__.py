"""A tiny random model of every architecture in mlx-lm.

Configurations by label: the module's name in mlx_lm.models, with a suffix for variants.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes

from metalens.models.support import modules
from zoo import dense, experts, hybrids, wrappers

CONFIGS: dict[str, dict[str, Any]] = {**dense.CONFIGS, **experts.CONFIGS, **hybrids.CONFIGS, **wrappers.CONFIGS}


def module_of(label: str) -> str:
    """Return the module of a label: the longest module name with which the label begins."""
    return max((name for name in modules() if label == name or label.startswith(f"{name}-")), key=len)


def configuration(label: str, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a label, with other settings, which belong to the text model inside it if it has one."""
    config = copy.deepcopy(CONFIGS[label])
    config.get("text_config", config).update(settings)
    return config


def build(label: str, seed: int = 0, config: dict[str, Any] | None = None) -> nn.Module:
    """Build the model of a label, or of another configuration. Its random parameters make every norm, bias and scale matter."""
    config = configuration(label) if config is None else config
    model_class, args_class = _get_classes(config)
    rng = np.random.default_rng(seed)

    def drawn(p: mx.array) -> mx.array:
        if p.dtype == mx.uint32:  # weights that the model itself packs
            return mx.array(rng.integers(0, 2**32, p.shape, dtype=np.uint32))
        if not mx.issubdtype(p.dtype, mx.floating):
            return p
        values = rng.standard_normal(p.shape)
        return (p + mx.array(0.1 * values) if p.ndim < 2 else mx.array(values * p.shape[-1] ** -0.5)).astype(p.dtype)

    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map(drawn, model.parameters()))
    mx.eval(model.parameters())
    return model
