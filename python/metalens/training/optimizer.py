"""From gradients to updates, one layer at a time, so that the memory that an update needs beside parameters and state is one layer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from metalens.ops.backends import Precision
from metalens.training.config import TrainingConfig
from metalens.training.polar import orthogonalized
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError

# {name: array} of one layer's translator: parameters, or their gradient.
Parameters = dict[str, mx.array]


class LensMuon(optim.Muon):
    """MLX's Muon with an orthogonal factor that takes fewer products (see polar.py), and vectors scaled to unit length, as matrices are to unit norm.

    Products have operands of 16 bits where the CPU multiplies those faster, as Muon's author runs it: singular values come only to within a third of
    1, which rounding by 2^-9 does not change.

    Attributes:
        precision: of the products' operands.
        iterations: of polar.quintics; None = by the size of the matrix.
    """

    precision: Precision = "bfloat16"
    iterations: int | None = None

    def _zeropower_via_newtonschulz5(self, X: mx.array, steps: int) -> mx.array:  # noqa: N803 (MLX's names)
        return orthogonalized(X, self.iterations, self.precision)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """One parameter's update."""
        if gradient.ndim > 1:
            return cast("mx.array", super().apply_single(gradient, parameter, state))
        v = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = v
        update = (1 - self.momentum) * gradient + self.momentum * v
        scaled: mx.array = self.learning_rate * update / (mx.linalg.norm(update) + 1e-12)
        return parameter - scaled


def _made(config: TrainingConfig) -> Any:
    if config.optimizer == "sgd":
        return optim.SGD(learning_rate=0.0, momentum=config.momentum, nesterov=config.momentum > 0)
    if config.optimizer == "adam":
        return optim.Adam(learning_rate=0.0, betas=[config.momentum, 0.999], bias_correction=True)
    muon = LensMuon(learning_rate=0.0, momentum=config.momentum, weight_decay=0.0)
    muon.iterations = config.ns_steps
    return muon


class LensOptimizer:
    """The optimizer of a lens: one of MLX's for each layer.

    Args:
        config: the settings.
        parameters: that each layer, by number, begins with: the identity, or what the warm start found.
    """

    def __init__(self, config: TrainingConfig, parameters: dict[int, Parameters]) -> None:
        self.config = config
        self.by_layer = {layer: _made(config) for layer in parameters}
        by_distance = config.layer_rates == "distance" and config.warm_start_tokens > 0
        self.rates = {layer: mx.array(_distance(p["weight"]) if by_distance else 1.0) for layer, p in parameters.items()}
        for layer, optimizer in self.by_layer.items():
            optimizer.init({name: p.astype(mx.float32) for name, p in parameters[layer].items()})
            if config.dtype == "bfloat16":
                optimizer.state = _rounded(optimizer.state, None)

    def clip(self, norm: float) -> float:
        """What gradients of this joint norm are multiplied with."""
        return 1.0 if self.config.optimizer == "muon" else min(1.0, self.config.gradient_clip / (norm + 1e-6))

    def update(self, layer: int, parameters: Parameters, gradient: Parameters, step: int, scale: float) -> Parameters:
        """The layer's parameters after one step. Evaluated.

        Args:
            layer: its number.
            parameters: float32, or bfloat16 with stochastic rounding.
            gradient: of the same names and shapes, float32.
            step: counted from 0.
            scale: the clip's.
        """
        optimizer, config = self.by_layer[layer], self.config
        rate = config.learning_rate_at(step) * to_float(self.rates[layer])
        optimizer.learning_rate = rate
        wide = {name: p.astype(mx.float32) for name, p in parameters.items()}
        decayed = {name: g * scale for name, g in gradient.items()}
        if config.weight_decay and config.optimizer != "muon":
            decayed = {name: g + config.weight_decay * _from_identity(name, wide[name]) for name, g in decayed.items()}
        if config.dtype == "bfloat16":
            optimizer.state = _widened(optimizer.state)
        updated: Parameters = optimizer.apply_gradients(decayed, wide)
        if config.weight_decay and config.optimizer == "muon":
            updated = {name: p - rate * config.weight_decay * _from_identity(name, wide[name]) for name, p in updated.items()}
        if config.dtype == "bfloat16":
            key = mx.random.key(0x1E25 + (config.seed or 0))
            for number_of in (step, layer):
                key = mx.random.split(key, number_of + 2)[number_of + 1]
            of_parameters, of_state = mx.random.split(key, 2)
            updated = _rounded(updated, of_parameters)
            optimizer.state = _rounded(optimizer.state, of_state)
        mx.eval(updated, optimizer.state)
        return updated

    def state(self) -> dict[str, mx.array]:
        """Everything that the next update depends on, by name."""
        rates = {f"rates.{layer}": rate for layer, rate in self.rates.items()}
        return rates | {f"{layer}.{name}": a for layer, optimizer in self.by_layer.items() for name, a in _flat(optimizer.state)}

    def restore(self, state: dict[str, mx.array]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: if it is of another optimizer or other layers.
        """
        if set(state) != set(self.state()):
            raise InvalidValueError("The saved optimizer state is of another optimizer, or of other layers.")
        self.rates = {layer: state[f"rates.{layer}"] for layer in self.rates}
        for layer, optimizer in self.by_layer.items():
            prefix = f"{layer}."
            optimizer.state = tree_unflatten([(name.removeprefix(prefix), a) for name, a in state.items() if name.startswith(prefix)])


def gradient_norm(gradients: Sequence[Parameters]) -> float:
    """The Euclidean norm over all layers together."""
    squares: list[mx.array] = []
    for gradient in gradients:
        squares += [mx.sum(mx.square(g)) for g in gradient.values()]
        mx.eval(squares)  # layer after layer: MLX on a CPU reserves memory for all squares that are computed together
    return math.sqrt(math.fsum(map(to_float, squares)))


def stochastically_rounded(x: mx.array, key: mx.array) -> mx.array:
    """Float32 as bfloat16, up or down at random so that the mean is x: small updates are not lost.

    A bfloat16 is the upper half of a float32: a random lower half is added before the lower half is cut off. Infinity and NaN stay.
    """
    bits = x.view(mx.uint32)
    noise = mx.random.randint(0, 2**16, x.shape, mx.uint32, key=key)
    rounded = ((bits + noise) & 0xFFFF0000).view(mx.float32)
    return mx.where(mx.isfinite(x), rounded, x).astype(mx.bfloat16)


def _from_identity(name: str, p: mx.array) -> mx.array:
    """What a parameter adds to the identity: W - I for a whole matrix, everything else as it is."""
    return p - mx.eye(p.shape[0]) if name == "weight" else p


def _distance(weight: mx.array) -> float:
    """The root mean square of the singular values of W - I, W [D, D]."""
    return to_float(mx.linalg.norm(_from_identity("weight", weight.astype(mx.float32)))) / math.sqrt(weight.shape[0])


def _flat(state: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(state)
    return cast("list[tuple[str, mx.array]]", flat)


def _widened(state: Any) -> Any:
    return tree_unflatten([(name, a.astype(mx.float32) if a.dtype == mx.bfloat16 else a) for name, a in _flat(state)])


def _rounded(tree: Any, key: mx.array | None) -> Any:
    """Arrays in bfloat16; numbers (the step, the learning rate) as they are. Without a key for arrays that are still zero.

    Which random numbers an array gets follows from its name: a state that was read from a file has another order.
    """
    parts = []
    for i, (name, a) in enumerate(sorted(_flat(tree), key=lambda part: part[0])):
        if a.ndim == 0:
            parts.append((name, a))
        else:
            parts.append((name, a.astype(mx.bfloat16) if key is None else stochastically_rounded(a, mx.random.split(key, i + 2)[i + 1])))
    return tree_unflatten(parts)
