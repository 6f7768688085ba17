"""Machines of a known speed, in place of the probe."""

from metalens.training.speed import Speed


def machine(kl=2e-6, forward=1e9, product=1e8, **changes):
    """Return a speed of which all figures follow from a few."""
    figures = {"target": kl / 2, "kl": kl, "sampled_kl": kl, "check": kl / 2, "forward": forward, "beside": 0.0, "product": product}
    figures |= {"sampled_forward": forward, "sums": product, "solution": product, "iteration": product, "python": 0.01}
    return Speed(**figures | changes)
