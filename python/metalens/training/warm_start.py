"""A closed-form start: for every layer the affine map that comes nearest to the output of the last block, by ridge regression.

The last hidden state h* of the model is regressed on the hidden state h of a layer in one pass over the text. Only the sums of h h^T, h (h* - h)^T, h
and h* - h are kept, and a Cholesky solve gives W - I and b. The regularization pulls toward the identity. A token costs a forward pass of the model
and no head: a small part of its cost in a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import numpy as np

from metalens.models.capture import HiddenStates
from metalens.models.layers import Layer
from metalens.ops import Weight, gram, linear
from metalens.training.input_scale import InputScale, input_scale
from metalens.utils.arrays import to_float
from metalens.utils.cholesky import solve_positive_definite
from metalens.utils.errors import InvalidValueError


class Regression:
    """The sums of the regression of one layer.

    Rows are added about the mean of the first ones: sums about a far origin would lose the digits in which rows differ. The sum of h h^T is
    symmetric: only half of it is computed.

    Args:
        hidden_size: D.

    Attributes:
        origin: what is taken off h in the sums, [D].
        gram: sum of h h^T, [D, D].
        cross: sum of h (h* - h)^T, [D, D].
        inputs: sum of h, [D].
        outputs: sum of h* - h, [D].
        last_squares: sum of the squares of each dimension of h*, [D].
        rows: number of rows, a scalar.
    """

    def __init__(self, hidden_size: int) -> None:
        self.origin = mx.zeros((hidden_size,))
        self.gram, self.cross = mx.zeros((hidden_size, hidden_size)), mx.zeros((hidden_size, hidden_size))
        self.inputs, self.outputs = mx.zeros((hidden_size,)), mx.zeros((hidden_size,))
        self.last_squares, self.rows = mx.zeros((hidden_size,)), mx.zeros(())

    def add(self, h: mx.array, last: mx.array) -> None:
        """Add rows [T, D] of the layer and of the last block, float32."""
        if to_float(self.rows) == 0:
            self.origin = mx.mean(h, axis=0)
        difference, columns = last - h, mx.contiguous((h - self.origin).T)
        self.gram = self.gram + gram(columns)
        self.cross = self.cross + linear(columns, Weight(difference), transpose=False)
        self.inputs = self.inputs + mx.sum(columns, axis=1)
        self.outputs = self.outputs + mx.sum(difference, axis=0)
        self.last_squares = self.last_squares + mx.sum(mx.square(last), axis=0)
        self.rows = self.rows + h.shape[0]
        mx.eval(self._sums())

    def sum_over(self, total: Callable[..., list[mx.array]]) -> None:
        """Replace the sums, about 0, by their `total` over the processes that divide the text."""
        origin = self.origin
        self.gram = self.gram + _outer(self.inputs, origin) + _outer(origin, self.inputs + self.rows * origin)
        self.cross = self.cross + _outer(origin, self.outputs)
        self.inputs, self.origin = self.inputs + self.rows * origin, mx.zeros(origin.shape)
        self.gram, self.cross, self.inputs, self.outputs, self.last_squares, self.rows = total(*self._sums())

    def is_finite(self) -> bool:
        """Tell whether all sums are finite."""
        return all(to_float(mx.all(mx.isfinite(each))) for each in self._sums())

    def scale(self) -> InputScale:
        """Return the scale of the hidden states. Needs sums about 0, see `sum_over`."""
        return input_scale(mx.diagonal(self.gram), self.last_squares, self.rows)

    def solution(self, ridge: float) -> tuple[mx.array, mx.array]:
        """Solve for W [D, D] and b [D]. `ridge` is relative to the mean square of the states. The bias is not regularized.

        Needs sums about 0, see `sum_over`.

        Raises:
            InvalidValueError: if there are too few tokens for so little regularization.
        """
        rows = to_float(self.rows)
        squares, cross, inputs, outputs = (np.array(a).astype(np.float64) / rows for a in (self.gram, self.cross, self.inputs, self.outputs))
        size = len(squares)
        regularization = (ridge + 1e-12) * float(np.trace(squares)) / size
        # About the means the regression has no bias.
        squares, cross = squares - np.outer(inputs, inputs), cross - np.outer(inputs, outputs)
        squares[np.diag_indices(size)] += regularization
        try:
            found = solve_positive_definite(squares, cross)
        except np.linalg.LinAlgError as error:
            raise InvalidValueError(
                f"The warm start has no solution with ridge={ridge}: the hidden states of its tokens do not span the {size} dimensions of the "
                "residual stream. Raise warm_start_tokens or ridge (1e-3 is the default)."
            ) from error
        weight, bias = np.eye(size) + found.T, outputs - inputs @ found
        return mx.array(weight.astype(np.float32)), mx.array(bias.astype(np.float32))

    def _sums(self) -> tuple[mx.array, ...]:
        return self.gram, self.cross, self.inputs, self.outputs, self.last_squares, self.rows


def _outer(a: mx.array, b: mx.array) -> mx.array:
    return a[:, None] * b[None]


def warm_start(
    hidden_states: Iterable[HiddenStates], layers: Sequence[Layer], hidden_size: int, ridge: float, total: Callable[..., list[mx.array]]
) -> dict[Layer, dict[str, mx.array]]:
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
    hidden_states: Iterable[HiddenStates], layers: Sequence[Layer], hidden_size: int, total: Callable[..., list[mx.array]]
) -> dict[Layer, Regression]:
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
        regression.sum_over(total)
        if not to_float(regression.rows) > 0 or not regression.is_finite():
            raise InvalidValueError(
                "The warm start saw no text, or hidden states that are not finite. Look for damaged weights or token ids outside the vocabulary. "
                "If the model is float16, its activations may overflow: convert it to bfloat16 (mlx_lm.convert --dtype bfloat16)."
            )
    return found
