"""A budget in tokens, divided between the guard, the warm start, the number of steps and the tokens of a step.

The rules, for every recipe:

* A recipe without steps (the closed form alone) gives all tokens to the warm start.
* A recipe with a warm start and steps gives a third of the tokens to the warm start, but no more than the recipe's own number.
* The rest goes to steps. Many small steps are better than few large ones (docs/recipes.md), but steps of fewer than 128 tokens use the kernels badly
  and are noisy. So there are as many steps as the recipe has, of the size that this leaves, from 128 tokens to the recipe's own size. A small budget
  takes fewer steps of 128 tokens, and one larger than the recipe takes more steps of the recipe's size.
* A setting that the caller gives stays as it is, as far as the tokens reach.
* The tokens that the guard holds back come first, at most 1/17 of the budget: a run takes no more text than its budget. (A text whose sequences are
  longer than the guard's share loses whole sequences to it, and every step may take a part of a sequence more.)
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from metalens.training.config import HELD_BACK, MIN_SEQUENCE
from metalens.training.data.sampler import MIN_HELD
from metalens.utils.errors import InvalidValueError

LEAST_STEP = 128  # tokens of a step, unless the caller or the recipe has smaller ones
WARM_PART = 3  # a recipe with steps gives a third of the tokens to the warm start


def divided(tokens: int, settings: Mapping[str, Any], given: Container[str], longest: int) -> dict[str, int]:
    """Divide a budget: return num_steps, tokens_per_step and warm_start_tokens that need, with the guard, at most `tokens` tokens of the text.

    Args:
        tokens: the budget.
        settings: settings of the recipe and of the caller, by name.
        given: names of the caller's own settings.
        longest: largest number of tokens in a sequence, if `max_seq_len` is not given.

    Raises:
        InvalidValueError: if the budget is smaller than a sequence.
    """
    steps, warm = int(settings.get("num_steps", 1)), int(settings.get("warm_start_tokens") or 0)
    length = int(settings["max_seq_len"]) if "max_seq_len" in given else None
    shortest = length or MIN_SEQUENCE
    if tokens < shortest:
        raise InvalidValueError(f"A budget of {tokens} tokens is too small: a sequence has {shortest}. Give more tokens.")
    if steps == 0:
        return {"num_steps": 0, "warm_start_tokens": min(tokens, warm) if "warm_start_tokens" in given else tokens}
    tokens -= _held_back(tokens, int(settings.get("guard_tokens") or 0), shortest)
    if warm:
        warm = min(warm, max(1, tokens // (2 if "warm_start_tokens" in given else WARM_PART)), tokens - shortest)
    rest = tokens - warm
    step = _step_tokens(rest, steps, settings.get("tokens_per_step"), length, longest, given)
    whole = length or min(longest, step)
    step = max(step // whole, 1) * whole
    count = rest // step
    if "num_steps" in given:
        count = min(count, steps)
    return {"num_steps": count, "tokens_per_step": step, "warm_start_tokens": warm}


def _held_back(tokens: int, guard: int, shortest: int) -> int:
    """Return the tokens of a budget to leave for the guard, which holds back at most 1/HELD_BACK of the others."""
    held = min(guard, -(-tokens // (HELD_BACK + 1)))
    return held if held >= MIN_HELD and tokens - held >= shortest else 0


def _step_tokens(rest: int, steps: int, largest: int | None, length: int | None, longest: int, given: Container[str]) -> int:
    """Return the tokens of a step, before they are rounded to whole sequences."""
    shortest, largest = length or MIN_SEQUENCE, largest or length or longest
    if "tokens_per_step" in given and "num_steps" not in given:
        return min(largest, rest)
    if "num_steps" in given and "tokens_per_step" not in given:
        return min(max(rest // steps, shortest), rest)
    least = min(max(LEAST_STEP, shortest), largest)
    return min(max(min(rest // steps, largest), least), rest)
