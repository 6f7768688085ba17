"""The guard: no layer of a lens ends worse than its best checked state, on text that is held back from training.

Every so often each layer is read on the held-back text. A layer that is clearly worse than at its best goes back to that state, with half the rate
and without its momentum. At the end of a pass every layer takes its best checked state; the first one is the state that training starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from metalens.lenses.translators import translated
from metalens.models.layers import EMBEDDING, Layer
from metalens.models.unembed import Unembed
from metalens.ops import lens_stats, normed
from metalens.readings.numbering import layer_name
from metalens.training.batching import BatchedCapture
from metalens.training.config import TrainingConfig
from metalens.training.data import Step
from metalens.training.distributed import Group
from metalens.training.objective import KL, Objective
from metalens.training.optimizer import Parameters
from metalens.training.step import piece_tokens
from metalens.utils.arrays import to_list

# A check reads the full vocabulary. Beside steps that do so too, a checked token costs at most half of a training token, and at most 1/20 of the run
# goes into checks, beside the first and the last one. Steps on a sample are faster: a checked token costs 3 of them on SmolLM2-135M.
TOKENS_PER_CHECKED, TOKENS_PER_CHECKED_OF_SAMPLED = 10, 30
MOST_CHECKS = 40
WORSE = 1.1  # a layer is set back when its KL is more than this times its best, ...
WORSE_BY = 0.001  # ... and more than this many nats, which a layer of no loss may be off by rounding
SHOWN = 4  # layers that a message names


class GuardWarning(RuntimeWarning):
    """A layer has become worse in training, and was set back to its best state."""


def check_every(config: TrainingConfig, tokens: int) -> int:
    """Return the number of steps between two checks, for a number of held-back tokens."""
    tokens_per_checked = TOKENS_PER_CHECKED if config.vocabulary == "full" else TOKENS_PER_CHECKED_OF_SAMPLED
    checks = min(max(config.num_steps * config.step_tokens // (tokens_per_checked * max(tokens, 1)), 1), MOST_CHECKS)
    return -(-config.num_steps // checks)


def held_back_loss(
    parameters: Sequence[Parameters],
    layers: Sequence[Layer],
    text: Step,
    capture: BatchedCapture,
    unembed: Unembed,
    pause: Callable[[], None] | None = None,
    done: Callable[[int], None] = lambda _: None,
    objective: Objective = KL,
) -> mx.array:
    """Return the sum of the loss over the tokens of a text that count, in nats, and the number of tokens: [len(layers) + 1]. Evaluated.

    Args:
        parameters: parameters of each layer.
        layers: numbers of the layers.
        text: the text.
        capture: captures the model's hidden states.
        unembed: the model's norm and head.
        pause: function that is called after each part of the work, see `BatchedCapture.hidden_states`. None = none.
        done: function of a number of tokens that is called when they have gone through the head.
        objective: the loss.
    """
    total = mx.zeros((len(layers) + 1,))
    for batch in capture.hidden_states(text, pause):
        at, to = objective.pairs(batch)
        if at is not None and not at.size:
            continue
        last, labels = normed(batch.rows(-1, to).astype(mx.float32), unembed.norm), objective.labels(batch, to)
        rows = mx.stack([translated(p, batch.rows(layer, at).astype(mx.float32), unembed.norm) for p, layer in zip(parameters, layers, strict=True)])
        tokens = last.shape[0]
        size = piece_tokens(len(layers), unembed.head) or tokens
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            if labels is None:
                loss = lens_stats(rows[:, part], unembed.head, 1, last[part]).kl
            else:
                loss = lens_stats(rows[:, part], unembed.head, 1, labels=labels[part]).nll
            assert loss is not None
            count = min(size, tokens - start)
            total = total + mx.concatenate([mx.sum(loss, axis=1), mx.array([float(count)])])
            mx.eval(total)
            done(count)
            if pause is not None:
                pause()
    return total


@dataclass
class BestStates:
    """The best checked state of every layer of a pass.

    Attributes:
        kl: mean KL on the held-back text in nats per token, by layer. Empty before the first check.
        parameters: parameters of each layer.
    """

    kl: dict[Layer, float] = field(default_factory=dict)
    parameters: dict[Layer, Parameters] = field(default_factory=dict)

    def worse(self, found: Mapping[Layer, float], parameters: Mapping[Layer, Parameters]) -> list[Layer]:
        """Take over the layers that are better than before. Return the layers that are clearly worse.

        Args:
            found: mean KL by layer; may be not finite.
            parameters: parameters of each layer.
        """
        risen = []
        for layer, kl in found.items():
            best = self.kl.get(layer, math.inf)
            if layer not in self.kl or kl < best:
                self.kl[layer], self.parameters[layer] = kl if math.isfinite(kl) else math.inf, dict(parameters[layer])
            elif not kl <= max(WORSE * best, best + WORSE_BY):
                risen.append(layer)
        return risen

    def arrays(self) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint, by name."""
        found = {f"kl.{layer}": mx.array(np.array([kl]).view(np.uint32)) for layer, kl in self.kl.items()}
        return found | {f"{layer}.{name}": p for layer, parameters in self.parameters.items() for name, p in parameters.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, mx.array]) -> BestStates:
        """Return the states whose `arrays` these are."""
        found = cls()
        for name, array in arrays.items():
            first, _, rest = name.partition(".")
            if first == "kl":
                found.kl[_layer_named(rest)] = float(np.array(array).view(np.float64)[0])
            else:
                found.parameters.setdefault(_layer_named(first), {})[rest] = array
        return found


def _layer_named(name: str) -> Layer:
    """Return the layer that the name of an array of a checkpoint has in it."""
    return EMBEDDING if name == EMBEDDING else int(name)


class Guard:
    """Checks the layers of a run on held-back text.

    Args:
        held_back: the text that is held back, of all processes.
        config: the settings.
        capture: captures the model's hidden states.
        unembed: the model's norm and head.
        group: processes of the run.

    Attributes:
        tokens: number of held-back tokens, of those that count. 0 = there is no guard.
    """

    def __init__(self, held_back: Step, config: TrainingConfig, capture: BatchedCapture, unembed: Unembed, group: Group) -> None:
        rank, world = group.data_rank
        self.tokens = held_back.tokens
        counted = None if held_back.counted is None else held_back.counted[rank::world]
        self._text = replace(held_back, sequences=held_back.sequences[rank::world], counted=counted)
        self._config, self._capture, self._unembed, self._group = config, capture, unembed, group
        self._objective = Objective.of(config)
        self._every = check_every(config, self.tokens)

    def due(self, step: int) -> bool:
        """Tell whether the layers are checked after this number of steps of a pass."""
        return self.tokens > 0 and (step % self._every == 0 or step == self._config.num_steps)

    def kl(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[Layer, Parameters],
        pause: Callable[[], None] | None = None,
        done: Callable[[int], None] = lambda _: None,
    ) -> dict[Layer, float]:
        """Return the mean loss of layers on the held-back text, nats per token, the same in all processes that train a layer.

        `pause` and `done` are as in `held_back_loss`.
        """
        if not layers:
            if self._capture.runs_for(layers):
                for _ in self._capture.hidden_states(self._text, pause):
                    pass
            return {}
        chosen = [parameters[layer] for layer in layers]
        mine = held_back_loss(chosen, layers, self._text, self._capture, self._unembed, pause, done, self._objective)
        (total,) = self._group.sum_over_data(mine)
        *sums, tokens = to_list(total)
        return {layer: kl / tokens for layer, kl in zip(layers, sums, strict=True)}


def message(layers: Sequence[Layer], found: Mapping[Layer, float], best: Mapping[Layer, float], step: int, ended: bool, loss: str = "KL") -> str:
    """Return what happened to the layers that were set back, in one line."""
    each = [f"{layer_name(layer)} ({loss} {found[layer]:.3f}, at its best {best[layer]:.3f})" for layer in layers[:SHOWN]]
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    then = "The lens has the best state." if ended else "It goes on from its best state with half the rate."
    if len(layers) > 1 and not ended:
        then = "They go on from their best states with half the rate."
    return f"After step {step} the text that is held back is predicted worse than before by {', '.join(each)}{more}. {then}"
