"""What attention and the feed-forward layer of every block add to the residual stream, and the stream between the two.

A block with two residual sums computes middle = input + attention, output = middle + mlp. Here "attention" and "mlp" are what is added: in models
that norm the output of a module before they add it (Gemma 2 and 3), the normed one. Which module that is, is found by the sum: input + attention +
mlp must give the block's output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import mlx.core as mx

from metalens.models.capture import ResidualCapture, ResidualStreamError
from metalens.models.submodules import SubmoduleRecorder
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError

Sublayer: TypeAlias = Literal["attention", "middle", "mlp"]
SUBLAYERS: Final[tuple[Sublayer, ...]] = ("attention", "middle", "mlp")

ATTENTION = re.compile(r"attn|attention|mixer|conv", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|ffn|feed_forward|moe|ff\b", re.IGNORECASE)
# Rounding of two residual sums in the type of the stream, relative to the largest number of a row.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 4e-2}


@dataclass(frozen=True)
class SublayerStates:
    """The hidden states inside the blocks for one forward pass. Block i is at index i of every list; [B, T, D] each.

    Attributes:
        attention: what attention adds.
        middle: the input of the block plus `attention`. In blocks whose attention and feed-forward layer read the same input (GPT-NeoX, Phi) no
            module reads this state.
        mlp: what the feed-forward layer adds.
        hidden: the output of each block.
        logits: the model's logits [B, T, V].
    """

    attention: list[mx.array]
    middle: list[mx.array]
    mlp: list[mx.array]
    hidden: list[mx.array]
    logits: mx.array

    def of(self, sublayer: Sublayer) -> list[mx.array]:
        """Return the states of one kind (InvalidValueError for another name)."""
        if sublayer not in SUBLAYERS:
            raise InvalidValueError(f"sublayer must be one of {', '.join(SUBLAYERS)}, got {sublayer!r}.")
        found: list[mx.array] = getattr(self, sublayer)
        return found


def capture_sublayers(source: ResidualCapture, ids: mx.array) -> SublayerStates:
    """Run the model on token ids and keep what every block's attention and feed-forward layer add. Evaluated.

    Args:
        source: captures the model's hidden states.
        ids: token ids [B, T].

    Raises:
        ResidualStreamError: if a block does not add the outputs of two of its modules: it scales them, or has other parts.
        ContextError: as `ResidualCapture.capture`.
    """
    recorder = SubmoduleRecorder(source.layers, {})
    with recorder.attached():
        states = source.capture(ids, with_embedding=True)
    assert states.embedding is not None
    inputs = [states.embedding, *states.hidden[:-1]]
    found = [_parts(i, recorder, before, after) for i, (before, after) in enumerate(zip(inputs, states.hidden, strict=True))]
    attention, mlp = ([pair[which] for pair in found] for which in (0, 1))
    middle = [before + added for before, added in zip(inputs, attention, strict=True)]
    mx.eval(attention, middle, mlp)
    return SublayerStates(attention, middle, mlp, states.hidden, states.logits)


def _parts(block: int, recorder: SubmoduleRecorder, before: mx.array, after: mx.array) -> tuple[mx.array, mx.array]:
    """Return what attention and the feed-forward layer of a block add."""
    called = [(name, value) for (i, name), value in recorder.outputs.items() if i == block and "." not in name and value.shape == after.shape]
    pairs = [(a, m) for a in _candidates(called, ATTENTION) for m in _candidates(called, FEED_FORWARD)]
    errors = [_error(before, a, m, after) for a, m in pairs]
    if not errors or not min(errors) <= TOLERANCE.get(after.dtype, 0.0):
        names = ", ".join(name for name, _ in called)
        raise ResidualStreamError(
            f"Block {block} does not add the outputs of its attention and its feed-forward layer to its input: its modules are {names}. "
            "Its sublayers can't be read; its output can."
        )
    return pairs[errors.index(min(errors))]


def _candidates(called: Sequence[tuple[str, mx.array]], pattern: re.Pattern[str]) -> list[mx.array]:
    """Return the outputs that may be added: those of modules, but norms, with such a name, and of the norms that run right after them."""
    found = []
    for place, (name, value) in enumerate(called):
        if pattern.search(name) and "norm" not in name:
            found.append(value)
            following = called[place + 1 : place + 2]
            found += [output for other, output in following if "norm" in other]
    return found


def _error(before: mx.array, a: mx.array, m: mx.array, after: mx.array) -> float:
    """Return the largest error of before + a + m, relative to the largest number of its row."""
    wide = [x.astype(mx.float32) for x in (before, a, m, after)]
    error = mx.abs(wide[0] + wide[1] + wide[2] - wide[3])
    size = mx.max(mx.stack([mx.max(mx.abs(x), axis=-1) for x in wide]), axis=0, keepdims=False)[..., None]
    return to_float(mx.max(error / (size + 1e-6)))
