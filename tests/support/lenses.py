"""Lenses with random numbers, in every form, and their comparison."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from metalens import TunedLens

FORMS = {
    "full": {},
    "low-rank": {"rank": 2},
    "whole rank": {"rank": 5},
    "bias": {"bias_only": True},
    "full, some layers": {"layers": [0, 2]},
    "low-rank, some layers": {"rank": 1, "layers": [1]},
    "bias, no layers": {"bias_only": True, "layers": []},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def trained(num_layers=2, dim=3, seed=0):
    """A lens whose every number is different from the identity's."""
    lens = TunedLens(num_layers, dim)
    rng = np.random.default_rng(seed)
    for translator in lens.translators:
        translator.weight = mx.array(rng.normal(size=(dim, dim)).astype(np.float32))
        translator.bias = mx.array(rng.normal(size=(dim,)).astype(np.float32))
    return lens


def randomized(form, num_layers=3, dim=5, seed=0):
    """A lens of this form whose every parameter is random."""
    lens = TunedLens(num_layers, dim, **form)
    rng = np.random.default_rng(seed)
    lens.update(tree_map(lambda p: mx.array(rng.normal(size=p.shape).astype(np.float32)), lens.parameters()))
    return lens


def flat(lens):
    return {name: np.array(p) for name, p in tree_flatten(lens.parameters())}


def assert_same(a, b):
    assert (a.num_layers, a.hidden_dim, a.rank, a.bias_only, a.layers) == (b.num_layers, b.hidden_dim, b.rank, b.bias_only, b.layers)
    x, y = flat(a), flat(b)
    assert x.keys() == y.keys()
    for name, array in x.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, y[name])
    assert a.provenance == b.provenance
