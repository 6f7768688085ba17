"""A closed-form start: for every layer the affine map that comes nearest to the output of the last block, by ridge regression.

The last hidden state h* of the model is regressed on the hidden state h of a layer in one pass over the text. Only the sums of x x^T and
x (h* - h)^T, x = (h, 1), are kept, and a Cholesky solve gives W - I and b. The regularization pulls toward the identity. A token costs a forward pass
of the model and no head: a small part of its cost in a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import numpy as np

from metalens.models.capture import HiddenStates
from metalens.ops import Weight, linear
from metalens.training.input_scale import InputScale, input_scale
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError


class Regression:
    """The sums of the regression of one layer.

    Args:
        hidden_size: D.
    """

    def __init__(self, hidden_size: int) -> None:
        self.gram = mx.zeros((hidden_size + 1, hidden_size + 1))
        self.cross = mx.zeros((hidden_size + 1, hidden_size))
        self.last_squares = mx.zeros(())

    def add(self, h: mx.array, last: mx.array) -> None:
        """Add rows [T, D] of the layer and of the last block, float32."""
        x = mx.concatenate([h, mx.ones((h.shape[0], 1))], axis=1).T
        self.gram = self.gram + linear(x, Weight(x))
        self.cross = self.cross + linear(x, Weight((last - h).T))
        self.last_squares = self.last_squares + mx.sum(mx.square(last))
        mx.eval(self.gram, self.cross, self.last_squares)

    def scale(self) -> InputScale:
        """Return the scale of the hidden states."""
        squares = mx.diagonal(self.gram)
        return input_scale(squares[:-1], self.last_squares, squares[-1])

    def solution(self, ridge: float) -> tuple[mx.array, mx.array]:
        """Solve for W [D, D] and b [D]. `ridge` is relative to the mean square of the states. The bias is not regularized.

        Raises:
            InvalidValueError: if there are too few tokens for so little regularization.
        """
        gram, cross = (np.array(a).astype(np.float64) for a in (self.gram, self.cross))
        gram, cross = gram / gram[-1, -1], cross / gram[-1, -1]  # the last entry is the number of rows
        size = len(gram) - 1
        scale = float(np.trace(gram[:size, :size])) / size
        regularized = gram + np.diag([*[ridge * scale + 1e-12 * scale] * size, 1e-12])
        try:
            factor = np.linalg.cholesky(regularized)
        except np.linalg.LinAlgError as error:
            raise InvalidValueError(
                f"The warm start has no solution with ridge={ridge}: the hidden states of its tokens do not span the {size} dimensions of the "
                "residual stream. Raise warm_start_tokens or ridge (1e-3 is the default)."
            ) from error
        found = np.linalg.solve(factor.T, np.linalg.solve(factor, cross))
        weight = np.eye(size) + found[:size].T
        return mx.array(weight.astype(np.float32)), mx.array(found[size].astype(np.float32))


def warm_start(
    hidden_states: Iterable[HiddenStates], layers: Sequence[int], hidden_size: int, ridge: float, total: Callable[..., list[mx.array]]
) -> dict[int, dict[str, mx.array]]:
    """Return the closed-form translators, {layer: {"weight": [D, D], "bias": [D]}}. Arguments and errors as for `regressions`.

    Args:
        ridge: strength of the regularization, relative to the mean square of the states.
    """
    solved = {}
    for layer, regression in regressions(hidden_states, layers, hidden_size, total).items():
        weight, bias = regression.solution(ridge)
        solved[layer] = {"weight": weight, "bias": bias}
    return solved


def regressions(
    hidden_states: Iterable[HiddenStates], layers: Sequence[int], hidden_size: int, total: Callable[..., list[mx.array]]
) -> dict[int, Regression]:
    """Return the sums of the regression of every layer.

    Args:
        hidden_states: forward passes of the model.
        layers: layers to solve for.
        hidden_size: D.
        total: function that sums arrays over the processes that divide the text.

    Raises:
        InvalidValueError: if there is no hidden state, or if one is not finite.
    """
    found = {layer: Regression(hidden_size) for layer in layers}
    for batch in hidden_states:
        last = batch.rows(-1).astype(mx.float32)
        for layer, regression in found.items():
            regression.add(batch.rows(layer).astype(mx.float32), last)
    for regression in found.values():
        sums = regression.gram, regression.cross, regression.last_squares
        regression.gram, regression.cross, regression.last_squares = total(*sums)
        if not to_float(regression.gram[-1, -1]) > 0 or not all(to_float(mx.all(mx.isfinite(sums))) for sums in (regression.gram, regression.cross)):
            raise InvalidValueError(
                "The warm start saw no text, or hidden states that are not finite. Look for damaged weights or token ids outside the vocabulary. "
                "If the model is float16, its activations may overflow: convert it to bfloat16 (mlx_lm.convert --dtype bfloat16)."
            )
    return found
