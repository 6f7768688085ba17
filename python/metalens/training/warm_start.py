"""A closed-form start: for every layer the affine map that comes nearest to the last block's output, by ridge regression.

The residual stream h of a layer is regressed on the model's last state h* in one streaming pass: the sums of x x^T and x (h* - h)^T, x = (h, 1), are
all that is kept, and a Cholesky solve gives W - I and b. The regularization pulls toward the identity. It costs a forward pass of the model and no
head: a small part of what a training step costs per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import numpy as np

from metalens.models.capture import HiddenStates
from metalens.ops import Weight, linear
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError


class Regression:
    """The sums of one layer's regression.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        self.gram = mx.zeros((width + 1, width + 1))
        self.cross = mx.zeros((width + 1, width))

    def add(self, h: mx.array, last: mx.array) -> None:
        """Rows [T, D] of the layer and of the last block, float32."""
        x = mx.concatenate([h, mx.ones((h.shape[0], 1))], axis=1).T
        self.gram = self.gram + linear(x, Weight(x))
        self.cross = self.cross + linear(x, Weight((last - h).T))
        mx.eval(self.gram, self.cross)

    def solution(self, ridge: float) -> tuple[mx.array, mx.array]:
        """(W [D, D], b [D]); `ridge` is relative to the states' mean square. The bias is not regularized.

        Raises:
            ValueError: if there are too few tokens for so little regularization.
        """
        gram, cross = (np.array(a).astype(np.float64) for a in (self.gram, self.cross))
        gram, cross = gram / gram[-1, -1], cross / gram[-1, -1]  # the last entry counts the rows
        width = len(gram) - 1
        scale = float(np.trace(gram[:width, :width])) / width
        regularized = gram + np.diag([*[ridge * scale + 1e-12 * scale] * width, 1e-12])
        try:
            factor = np.linalg.cholesky(regularized)
        except np.linalg.LinAlgError as error:
            raise InvalidValueError(
                f"The warm start has no solution with ridge={ridge}: the states of its tokens do not span the {width} dimensions of the residual "
                "stream. Raise warm_start_tokens or ridge (1e-3 is the default)."
            ) from error
        found = np.linalg.solve(factor.T, np.linalg.solve(factor, cross))
        weight = np.eye(width) + found[:width].T
        return mx.array(weight.astype(np.float32)), mx.array(found[width].astype(np.float32))


def warm_start(
    streams: Iterable[HiddenStates], layers: Sequence[int], width: int, ridge: float, total: Callable[..., list[mx.array]]
) -> dict[int, dict[str, mx.array]]:
    """{layer: {"weight", "bias"}}: the closed-form translators on these streams.

    Args:
        streams: forward passes of the model.
        layers: which layers.
        width: D.
        ridge: relative to the states' mean square.
        total: sums arrays over the processes that divide the streams among them.

    Raises:
        ValueError: if the streams hold no row or one that is not finite, or do not determine the solution.
    """
    regressions = {layer: Regression(width) for layer in layers}
    for stream in streams:
        last = stream.rows(-1).astype(mx.float32)
        for layer, regression in regressions.items():
            regression.add(stream.rows(layer).astype(mx.float32), last)
    solved = {}
    for layer, regression in regressions.items():
        regression.gram, regression.cross = total(regression.gram, regression.cross)
        if not to_float(regression.gram[-1, -1]) > 0 or not all(to_float(mx.all(mx.isfinite(sums))) for sums in (regression.gram, regression.cross)):
            raise InvalidValueError(
                "The warm start saw no text, or states that are not finite: look for damaged weights or token ids outside the vocabulary."
            )
        weight, bias = regression.solution(ridge)
        solved[layer] = {"weight": weight, "bias": bias}
    return solved
