"""A budget in tokens, divided between the guard, the warm start, the number of steps and the tokens of a step.

The rules, for every recipe:

* A recipe without steps (the closed form alone) gives all tokens to the warm start, in whole sequences of equal length.
* A recipe with a warm start and steps gives half of the tokens to the warm start, but no more than the recipe's own number, and no more than 16
  for each dimension of the hidden states: steps make more of further tokens than the closed form does.
* The rest goes to steps. Many small steps are better than few large ones (docs/recipes.md), but steps of fewer than 128 tokens use the kernels badly
  and are noisy. So there are as many steps as the recipe has, of the size that this leaves, from 128 tokens to the recipe's own size. A small budget
  takes fewer steps of 128 tokens, and one larger than the recipe takes more steps of the recipe's size.
* A setting that the caller gives stays as it is, as far as the tokens reach.
* The tokens that the guard holds back come first, at most 1/17 of the budget: a run takes no more text than its budget. (Packed documents, and
  texts of which answers alone count, lose whole sequences to it, and every step may take a part of a sequence more.)
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from metalens.training.config import HELD_BACK, MIN_SEQUENCE
from metalens.training.data.sampler import MIN_HELD
from metalens.utils.errors import InvalidValueError

LEAST_STEP = 128  # tokens of a step, unless the caller or the recipe has smaller ones
# A recipe with steps gives half of the tokens to the warm start. With a third, layers 11 to 13 of Gemma 3 end up to 3 % above the closed form of all
# tokens. Mean KL of `fast`, six layers, a third and half: Gemma 3 (6,144 tokens) 1.814, 1.798; SmolLM2 (6,144) 2.160, 2.075, (12,288) 1.831, 1.810.
WARM_PART = 2
# Tokens of the warm start for each dimension. Mean KL of `fast` with 51,200 tokens of the bundled text:
#   small (128 dimensions): 132 tokens 0.6562, 66 0.6524, 33 0.6515     demo (256): 66 tokens 0.7652, 33 0.7597, 16.5 0.7589
WARM_PER_DIMENSION = 16


def divided(tokens: int, settings: Mapping[str, Any], given: Container[str], longest: int, hidden_size: int | None = None) -> dict[str, int]:
    """Divide a budget: return num_steps, tokens_per_step and warm_start_tokens that need, with the guard, at most `tokens` tokens of the text.

    Without steps, return max_seq_len in place of tokens_per_step.

    Args:
        tokens: the budget.
        settings: settings of the recipe and of the caller, by name.
        given: names of the caller's own settings.
        longest: largest number of tokens in a sequence, if `max_seq_len` is not given.
        hidden_size: dimension of the hidden states. None = not known.

    Raises:
        InvalidValueError: if the budget is smaller than a sequence.
    """
    steps, warm = int(settings.get("num_steps", 1)), int(settings.get("warm_start_tokens") or 0)
    length = int(settings["max_seq_len"]) if "max_seq_len" in given else None
    shortest = length or MIN_SEQUENCE
    if tokens < shortest:
        raise InvalidValueError(f"A budget of {tokens} tokens is too small: a sequence has {shortest}. Give more tokens.")
    if steps == 0:
        wanted = min(tokens, warm) if "warm_start_tokens" in given else tokens
        longest = min(longest, int(settings.get("tokens_per_step") or longest))
        length = length or max(MIN_SEQUENCE, wanted // -(-wanted // longest))
        return {"num_steps": 0, "warm_start_tokens": wanted if wanted < tokens else tokens // length * length, "max_seq_len": length}
    tokens -= _held_back(tokens, int(settings.get("guard_tokens") or 0), shortest)
    if warm:
        if "warm_start_tokens" not in given and hidden_size is not None:
            warm = min(warm, WARM_PER_DIMENSION * hidden_size)
        warm = min(warm, max(1, tokens // WARM_PART), tokens - shortest)
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
