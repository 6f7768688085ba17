"""From gradients to updates, one layer at a time: beside parameters and state an update needs the memory of one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from metalens.models.layers import EMBEDDING, Layer
from metalens.ops import MuonDirection, Weight, linear, muon_direction, use_precision
from metalens.ops.backends import Precision, given_precision
from metalens.training.config import TrainingConfig
from metalens.training.input_scale import InputScale, unknown_scale
from metalens.training.polar import SLACK, polynomials
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError

# {name: array} of the translator of one layer: its parameters, or their gradient.
Parameters = dict[str, mx.array]


class LensMuon(optim.Muon):
    """MLX's Muon with an orthogonal factor that takes fewer products (see polar.py) and with vectors scaled to unit length.

    Products have operands of 16 bits where the CPU multiplies those faster, as the author of Muon runs it: singular values come only to within a
    half of 1, which rounding by 2^-9 does not change. A precision that the user sets goes before.

    Attributes:
        precision: precision of the operands of products, if none is set.
        iterations: number of polynomials, see `polar.polynomials`. None = chosen by the size of the matrix.
    """

    precision: Precision = "bfloat16"
    iterations: int | None = None

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """Return a parameter, a matrix or a vector, after a step with Nesterov momentum. Replace the momentum in `state`."""
        rate = self.learning_rate
        if gradient.ndim == 1:
            step: mx.array = rate * _unit(self.with_momentum(gradient, state))
        else:
            rows, columns = gradient.shape  # MLX makes the steps of tall matrices longer
            step = rate * max(1, rows / columns) ** 0.5 * self.direction(gradient, state).direction
        return parameter - step

    def with_momentum(self, gradient: mx.array, state: dict[str, Any]) -> mx.array:
        """Return the direction of Nesterov momentum. Replace the momentum in `state`."""
        v: mx.array = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = v
        update: mx.array = (1 - self.momentum) * gradient + self.momentum * v
        return update

    def direction(
        self, gradient: mx.array, state: dict[str, Any], row_scale: mx.array | None = None, column_scale: mx.array | None = None
    ) -> MuonDirection:
        """Return the direction of a matrix, in the coordinates of the scales (see `ops.muon_direction`). Replace the momentum in `state`."""
        odd, _ = polynomials(min(gradient.shape), self.iterations)
        with use_precision(given_precision() or self.precision):
            found = muon_direction(gradient, state["v"], self.momentum, odd, SLACK, row_scale, column_scale)
        state["v"] = found.momentum
        return found


class LossMuon(LensMuon):
    """Muon with steps as long as the loss asks for: by the gradient, each would take `learning_rate` (0.1: a tenth) off the layer's loss.

    Directions are orthogonal in coordinates that have the scale of the hidden states: with V = R^-1 W S, R the diagonal matrix of the rms of the last
    hidden states' dimensions, S that of the square roots of the layer's, the direction is P = R polar(momentum of R G S^-1) S^-1. The unit of a
    dimension of the output changes nothing. Square roots, because a few tokens with huge states (attention sinks) may make up the rms of the input.

    The length is learning_rate * loss / <G, P>: Polyak's step with 0 as the least loss. So no constant belongs to a model, and a layer whose loss is
    0 stays where it is.

    Beside a matrix a bias moves by BIAS * learning_rate * R u, u the unit vector of its momentum in these coordinates. A bias alone takes the step of
    the loss.

    Attributes:
        loss: loss of the layer on the batch, in the unit of the gradient.
        scale: rms of the hidden states.
    """

    BIAS = 0.4
    # The least <G, P>, relative to the same product with the momentum in place of G: on a noisy batch the gradient may be orthogonal to the momentum.
    LEAST = 0.5

    loss: float = 0.0
    scale: InputScale

    def apply_gradients(self, gradients: Parameters, parameters: Parameters) -> Parameters:
        """Return the parameters after a step. Replace the momentum in the state."""
        known = 1 - self.momentum ** (to_float(self.state["step"]) + 2)  # part of the Nesterov momentum that is not its start, 0
        self.state["step"] = self.state["step"] + 1
        if self.loss == 0:  # the step has no length, whatever its direction
            for name, gradient in gradients.items():
                self.with_momentum(gradient, self.state[name])
            return parameters
        matrices = [name for name in parameters if parameters[name].ndim == 2]
        directions: Parameters = {}
        slopes: list[mx.array] = []
        for name, gradient in gradients.items():
            outputs = self.scale.outputs if name in TO_LAST else mx.ones((1,))
            if name in matrices:
                inputs = mx.sqrt(self.scale.inputs) if name in ON_HIDDEN_STATES else None
                found = self.direction(gradient, self.state[name], mx.broadcast_to(outputs, gradient.shape[:1]), inputs)
                directions[name] = found.direction
                slopes.append(found.slopes)
                continue
            update = self.with_momentum(gradient, self.state[name])
            directions[name] = outputs * _unit(outputs * update)
            if not matrices:
                slopes.append(mx.stack([mx.sum(gradient * directions[name]), mx.sum(update * directions[name])]))
        slope, of_momentum = (to_float(s) for s in mx.sum(mx.stack(slopes), axis=0))
        slope = max(slope, self.LEAST * of_momentum / known)
        rate = to_float(self.learning_rate)
        length = rate * self.loss / slope if slope > 0 else 0.0
        bias_length = self.BIAS * rate if self.loss > 0 else 0.0
        lengths = {name: length if name in matrices or not matrices else bias_length for name in parameters}
        return {name: p - lengths[name] * directions[name] for name, p in parameters.items()}


# Matrices that are multiplied with hidden states, not with what another matrix has made of them.
ON_HIDDEN_STATES = ("weight", "down")
# Parameters whose rows are dimensions of the last hidden states.
TO_LAST = ("weight", "up", "bias")


def mlx_optimizer(config: TrainingConfig) -> Any:
    """Return MLX's optimizer for one layer. Its learning rate is set at every step."""
    if config.optimizer == "sgd":
        return optim.SGD(learning_rate=0.0, momentum=config.momentum, nesterov=config.momentum > 0)
    if config.optimizer == "adam":
        return optim.Adam(learning_rate=0.0, betas=[config.momentum, 0.999], bias_correction=True)
    made = LossMuon if config.step_size == "loss" else LensMuon
    muon = made(learning_rate=0.0, momentum=config.momentum, weight_decay=0.0)
    muon.iterations = config.ns_steps
    return muon


class LensOptimizer:
    """The optimizer of a lens: one of MLX's for each layer.

    Args:
        config: the settings.
        parameters: parameters of each layer at the start, by layer: the identity, or the solution of the warm start.
        scales: rms of the hidden states of each layer, for steps as long as the loss asks for. None = a `restore` follows.
    """

    def __init__(self, config: TrainingConfig, parameters: dict[Layer, Parameters], scales: Mapping[Layer, InputScale] | None = None) -> None:
        self.config = config
        self.scales: dict[Layer, InputScale] = {}
        if config.step_size == "loss":
            self.scales = {layer: scales[layer] if scales else unknown_scale() for layer in parameters}
        self.by_layer = {layer: self._made(of_layer) for layer, of_layer in parameters.items()}
        by_distance = config.layer_rates == "distance" and config.warm_start_tokens > 0
        self.rates = {layer: mx.array(_distance(p["weight"]) if by_distance else 1.0) for layer, p in parameters.items()}

    def set_back(self, layer: Layer, parameters: Parameters) -> None:
        """Halve the rate of a layer, and forget its momentum."""
        self.rates[layer] = self.rates[layer] * 0.5
        self.by_layer[layer] = self._made(parameters)

    def _made(self, parameters: Parameters) -> Any:
        """Return an optimizer for one layer, without momentum."""
        optimizer = mlx_optimizer(self.config)
        optimizer.init({name: p.astype(mx.float32) for name, p in parameters.items()})
        if self.config.dtype == "bfloat16":
            optimizer.state = _as_bfloat16(optimizer.state, None)
        return optimizer

    def clip(self, norm: float) -> float:
        """Return the factor for gradients of this norm over all layers together."""
        return 1.0 if self.config.optimizer == "muon" else min(1.0, self.config.gradient_clip / (norm + 1e-6))

    def update(self, layer: Layer, parameters: Parameters, gradient: Parameters, step: int, scale: float, loss: float = 0.0) -> Parameters:
        """Return the parameters of a layer after one step. Evaluated.

        Args:
            layer: number of the layer.
            parameters: float32, or bfloat16, which is rounded stochastically.
            gradient: gradient of each parameter, float32.
            step: number of the step, from 0.
            scale: factor for the gradient, see `clip`.
            loss: loss that has this gradient, for steps as long as the loss asks for.
        """
        optimizer, config = self.by_layer[layer], self.config
        rate = config.learning_rate_at(step) * to_float(self.rates[layer])
        optimizer.learning_rate = rate
        if config.step_size == "loss":
            optimizer.loss, optimizer.scale = loss * scale, self.scales[layer]
        wide = {name: p.astype(mx.float32) for name, p in parameters.items()}
        decayed = {name: g * scale for name, g in gradient.items()}
        if config.weight_decay and config.optimizer != "muon":
            decayed = {name: g + config.weight_decay * _from_identity(name, wide[name]) for name, g in decayed.items()}
        if config.dtype == "bfloat16":
            optimizer.state = _as_float32(optimizer.state)
        updated: Parameters = optimizer.apply_gradients(decayed, wide)
        if config.weight_decay and config.optimizer == "muon":
            updated = {name: p - rate * config.weight_decay * _from_identity(name, wide[name]) for name, p in updated.items()}
        if config.dtype == "bfloat16":
            key = mx.random.key(0x1E25 + (config.seed or 0))
            for number_of in (step, -1 if layer == EMBEDDING else layer):
                key = mx.random.split(key, number_of + 2)[number_of + 1]
            of_parameters, of_state = mx.random.split(key, 2)
            updated = _as_bfloat16(updated, of_parameters)
            optimizer.state = _as_bfloat16(optimizer.state, of_state)
        mx.eval(updated, optimizer.state)
        return updated

    def state(self) -> dict[str, mx.array]:
        """Return all arrays that the next update depends on, by name."""
        rates = {f"rates.{layer}": rate for layer, rate in self.rates.items()}
        for layer, scale in self.scales.items():
            rates |= {f"inputs.{layer}": scale.inputs, f"outputs.{layer}": scale.outputs}
        return rates | {f"{layer}.{name}": a for layer, optimizer in self.by_layer.items() for name, a in _named_arrays(optimizer.state)}

    def restore(self, state: dict[str, mx.array]) -> None:
        """Go on from a `state`.

        Raises:
            InvalidValueError: if it belongs to another optimizer or to other layers.
        """
        if set(state) != set(self.state()):
            raise InvalidValueError("The saved optimizer state is of another optimizer, or of other layers.")
        self.rates = {layer: state[f"rates.{layer}"] for layer in self.rates}
        self.scales = {layer: InputScale(state[f"inputs.{layer}"], state[f"outputs.{layer}"]) for layer in self.scales}
        for layer, optimizer in self.by_layer.items():
            prefix = f"{layer}."
            optimizer.state = tree_unflatten([(name.removeprefix(prefix), a) for name, a in state.items() if name.startswith(prefix)])


def gradient_norm(gradients: Sequence[Parameters]) -> float:
    """Return the Euclidean norm over all layers together."""
    return math.sqrt(math.fsum(square for gradient in gradients for square in sums_of_squares(gradient)))


def sums_of_squares(gradient: Parameters) -> list[float]:
    """Return the sum of the squares of each parameter's gradient, in float32 precision: the same in a process that has all layers or a few."""
    squares = [_sum_of_squares(g) for g in gradient.values()]
    mx.eval(squares)  # layer by layer: MLX on a CPU reserves memory for all squares that are computed together
    return [to_float(square) for square in squares]


def _sum_of_squares(x: mx.array) -> mx.array:
    """Return the sum of the squares of all elements, float32. Lazy."""
    row = x.reshape(1, -1).astype(mx.float32)
    if mx.default_device() == mx.Device(mx.cpu):  # where MLX writes the squares to memory, and adds them in a row on one thread
        return linear(row, Weight(row))
    return mx.sum(mx.square(row))  # of a product with one result, one threadgroup of a GPU would do all the work


def stochastically_rounded(x: mx.array, key: mx.array) -> mx.array:
    """Round float32 to bfloat16, up or down at random so that the mean is x: small updates are not lost.

    A bfloat16 is the upper half of a float32. A random lower half is added before the lower half is cut off. Infinity and NaN stay.
    """
    bits = x.view(mx.uint32)
    noise = mx.random.randint(0, 2**16, x.shape, mx.uint32, key=key)
    rounded = ((bits + noise) & 0xFFFF0000).view(mx.float32)
    return mx.where(mx.isfinite(x), rounded, x).astype(mx.bfloat16)


def _from_identity(name: str, p: mx.array) -> mx.array:
    """Return the difference of a parameter from the identity: W - I for a full matrix, any other parameter unchanged."""
    return p - mx.eye(p.shape[0]) if name == "weight" else p


def _unit(vector: mx.array) -> mx.array:
    """Return a vector of length 1; zeros stay zero."""
    return vector / (mx.linalg.norm(vector) + 1e-12)


def _distance(weight: mx.array) -> float:
    """Return the root mean square of the singular values of W - I, W [D, D]."""
    return to_float(mx.linalg.norm(_from_identity("weight", weight.astype(mx.float32)))) / math.sqrt(weight.shape[0])


def _named_arrays(state: Any) -> list[tuple[str, mx.array]]:
    """Return the arrays of a nested state with their dotted names."""
    flat: Any = tree_flatten(state)
    return cast("list[tuple[str, mx.array]]", flat)


def _as_float32(state: Any) -> Any:
    return tree_unflatten([(name, a.astype(mx.float32) if a.dtype == mx.bfloat16 else a) for name, a in _named_arrays(state)])


def _as_bfloat16(tree: Any, key: mx.array | None) -> Any:
    """Round arrays to bfloat16, stochastically with a key; None = the arrays are zero. Numbers (step, learning rate) stay as they are.

    The random numbers of an array follow from its name: a state that was read from a file has another order.
    """
    parts = []
    for i, (name, a) in enumerate(sorted(_named_arrays(tree), key=lambda part: part[0])):
        if a.ndim == 0:
            parts.append((name, a))
        else:
            parts.append((name, a.astype(mx.bfloat16) if key is None else stochastically_rounded(a, mx.random.split(key, i + 2)[i + 1])))
    return tree_unflatten(parts)
