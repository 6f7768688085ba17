"""Models that end in unusual ways, and the comparison of what was found of their norm and head with their own logits."""

import warnings

import mlx.core as mx
import numpy as np

from metalens.models.capture import ResidualCapture
from metalens.models.unembed import Unembed
from support.mocks import MockModel

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2]])


def unembedded(model, *options):
    """Return the Unembed, and the model's hidden states and logits. Nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unembed = Unembed.from_model(model, *options)
    return unembed, ResidualCapture(model).capture(IDS)


def assert_reproduces(model, unembed, states, tolerance=2e-5):
    own = np.array(states.logits.astype(mx.float32))
    assert np.abs(own).max() > 1e-3
    found = unembed(states.hidden[-1])
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), own, rtol=tolerance, atol=tolerance * np.abs(own).max())


class Ending(MockModel):
    """Has a method for everything after the last block."""

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.end(x)

    def end(self, x):
        return self.lm_head(self.norm(x))


class WithoutBias(Ending):
    def __init__(self):
        super().__init__()
        del self.lm_head["bias"]


class Args:
    def __init__(self, **values):
        self.__dict__.update(values)


def with_end(end, values, cls=Ending):
    model = type("Ended", (cls,), {"end": end})()
    model.args = Args(**values)
    return model
